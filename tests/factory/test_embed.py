import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from factory.embed import Embedder, open_embedder
from factory.errors import GristmillError, MissingExtra, StoreError
from factory.stage import Vectors
from schemas.recipe import EmbedderChoice

TEXTS = ["I lost my card", "My bank card is lost", "The weather is lovely today"]


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return open_embedder(EmbedderChoice())


def _letters(texts: list[str]) -> Vectors:
    """A model that is small enough to follow: how often each of a, b, c stands in a text."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def test_minilm_gives_unit_vectors_that_are_near_where_texts_are(minilm: Embedder) -> None:
    vectors = minilm.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, minilm.dimension) == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.75
    assert cosines[0, 2] < 0.2


def test_minilm_does_not_depend_on_what_stands_beside_a_text(minilm: Embedder) -> None:
    alone = np.vstack([open_embedder(EmbedderChoice()).embed([text]) for text in TEXTS[:2]])
    beside = open_embedder(EmbedderChoice()).embed([*TEXTS, "word " * 300])
    assert np.abs(alone - beside[:2]).max() < 1e-5


def test_minilm_reads_256_tokens(minilm: Embedder) -> None:
    cut, longer = "card " * 254, "card " * 254 + "weather " * 200
    shorter = "card " * 200 + "weather " * 200
    vectors = minilm.embed([cut, longer, shorter])
    assert vectors[0] @ vectors[1] > 0.9999
    assert vectors[0] @ vectors[2] < 0.99


def test_equal_texts_are_computed_once_and_the_order_is_kept() -> None:
    asked: list[str] = []

    def spy(texts: list[str]) -> Vectors:
        asked.extend(texts)
        return _letters(texts)

    embedder = Embedder("letters", 3, spy)
    first = embedder.embed(["a", "bbbb", "a", "c"])
    assert first.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert embedder.embed(["c", "a"]).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert sorted(asked) == ["a", "bbbb", "c"]
    assert embedder.computed == 3


def test_batches_hold_texts_of_like_length() -> None:
    batches: list[list[int]] = []

    def spy(texts: list[str]) -> Vectors:
        batches.append([len(text) for text in texts])
        return _letters(texts)

    Embedder("letters", 3, spy).embed(["a" * (1 + (n * 37) % 100) for n in range(100)])
    assert len(batches) > 1
    flat = [length for batch in batches for length in batch]
    assert flat == sorted(flat)
    assert len(flat) == 100


def test_no_text_and_blank_text(minilm: Embedder) -> None:
    assert minilm.embed([]).shape == (0, 384)
    before = minilm.computed
    assert not minilm.embed(["", " \n"]).any()
    assert minilm.computed == before


def test_a_text_of_no_known_token_is_the_zero_vector_and_no_nan(tmp_path: Path) -> None:
    for _ in range(2):
        assert Embedder("letters", 3, _letters, tmp_path).embed(["xyz", "a"]).tolist() == [[0, 0, 0], [1, 0, 0]]


def test_vectors_outlive_the_process_that_made_them(tmp_path: Path) -> None:
    first = Embedder("letters", 3, _letters, tmp_path)
    vectors = first.embed(["a", "ab", "cab"])
    second = Embedder("letters", 3, _letters, tmp_path)
    assert (second.embed(["cab", "a", "ab"]) == vectors[[2, 0, 1]]).all()
    assert second.computed == 0
    second.embed(["b"])
    third = Embedder("letters", 3, _letters, tmp_path)
    third.embed(["b", "a"])
    assert third.computed == 0


def test_vectors_of_two_models_do_not_mix(tmp_path: Path) -> None:
    Embedder("letters", 3, _letters, tmp_path).embed(["a"])
    other = Embedder("other letters", 3, _letters, tmp_path)
    other.embed(["a"])
    assert other.computed == 1


@pytest.mark.parametrize("damage", ["cut", "blank"])
def test_a_crash_in_the_middle_of_writing_costs_one_vector(tmp_path: Path, damage: str) -> None:
    Embedder("letters", 3, _letters, tmp_path).embed(["a", "ab", "cab"])
    (file,) = tmp_path.rglob("*.vectors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] if damage == "cut" else whole[:-12] + bytes(12))
    for computed in (1, 0):  # what is mended is written, and stays
        again = Embedder("letters", 3, _letters, tmp_path)
        assert again.embed(["a", "ab", "cab"]) == pytest.approx(Embedder("letters", 3, _letters).embed(["a", "ab", "cab"]))
        assert again.computed == computed


def test_two_writers_of_one_folder_lose_nothing(tmp_path: Path) -> None:
    one, two = (Embedder("letters", 3, _letters, tmp_path) for _ in range(2))
    for n in range(1, 20):
        one.embed(["a" * n])
        two.embed(["b" * n])
    reader = Embedder("letters", 3, _letters, tmp_path)
    reader.embed(["a" * n for n in range(1, 20)] + ["b" * n for n in range(1, 20)])
    assert reader.computed == 0


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="can't write vectors"):
        Embedder("letters", 3, _letters, tmp_path / "file").embed(["a"])


def test_stages_may_embed_at_once() -> None:
    embedder = Embedder("letters", 3, _letters)
    texts = ["a" * n + "b" * (n % 7) for n in range(1, 300)]
    results: list[Vectors] = []
    threads = [threading.Thread(target=lambda: results.append(embedder.embed(texts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert embedder.computed == 299
    assert all((result == results[0]).all() for result in results)
    assert len(results) == 4


def _static_folder(folder: Path, scale: float) -> Path:
    from model2vec import StaticModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "card": 1, "lost": 2, "weather": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    table = np.array([[0, 0], [1, 0], [scale, 1], [0, 1]], np.float32)
    StaticModel(table, tokenizer).save_pretrained(folder)
    return folder


def test_a_static_model_of_the_users_own(tmp_path: Path) -> None:
    choice = EmbedderChoice(kind="static", model=str(_static_folder(tmp_path / "mine", 3)))
    embedder = open_embedder(choice, tmp_path / "cache")
    vectors = embedder.embed(["lost card", "card", "weather", "nothing known"])
    assert embedder.dimension == 2
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1, 0])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]

    _static_folder(tmp_path / "mine", -3)  # trained anew, under the same name
    again = open_embedder(choice, tmp_path / "cache")
    assert again.name != embedder.name
    assert (again.embed(["lost card"]) != vectors[0]).any()


def test_a_sentence_transformer(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    static = pytest.importorskip("sentence_transformers.models").StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "card": 1, "weather": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    model = library.SentenceTransformer(modules=[static(tokenizer, embedding_weights=np.eye(3, dtype=np.float32))], device="cpu")
    model.save(str(tmp_path / "model"))
    choice = EmbedderChoice(kind="sentence-transformers", model=str(tmp_path / "model"), options={"device": "cpu"})
    embedder = open_embedder(choice)
    assert embedder.embed(["card", "weather", "card"]) == pytest.approx(np.array([[0, 1, 0], [0, 0, 1], [0, 1, 0]]), abs=1e-6)


@pytest.mark.parametrize(("kind", "module"), [("static", "model2vec"), ("sentence-transformers", "sentence_transformers")])
def test_a_package_that_is_not_installed_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=kind) as caught:
        open_embedder(EmbedderChoice.model_validate({"kind": kind, "model": "any"}))
    assert "pip install 'gristmill[embed]'" in str(caught.value)


def test_a_model_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="sentence-transformers"):
        open_embedder(EmbedderChoice(model="another"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(GristmillError, match="can't load the model"):
        open_embedder(EmbedderChoice(kind="static", model=str(tmp_path / "empty")))
    with pytest.raises(GristmillError, match="no_such_option"):
        open_embedder(EmbedderChoice(kind="static", model=str(_static_folder(tmp_path / "mine", 3)), options={"no_such_option": 1}))
