"""Personal data in a text by its form: Presidio's pattern recognisers with their checksums, and names by a spaCy model if one is asked for.

No model is loaded by default. A recogniser takes a text at a time and some twenty of them a text would be slow, so each entity has a
gate, a cheap pattern that polars matches over a whole column; only what passes it reaches the recogniser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import polars as pl

from factory.errors import GristmillError

PRESIDIO = "presidio_analyzer.predefined_recognizers"
NAMES = ("PERSON", "LOCATION")  # only a model knows these
_OF_MODEL = {"PER": "PERSON", "PERSON": "PERSON", "GPE": "LOCATION", "LOC": "LOCATION"}  # how spaCy's models call them
NAMED = 0.85  # the confidence that Presidio gives to what a model names, which tells none of its own

# A recogniser's patterns may take time in the square of a text's length: 254 is the longest e-mail address (RFC 5321), and whatever
# is cut by the end of one piece stands whole in the next.
PIECE, OVERLAP = 2_000, 256
BEFORE, BEHIND = 60, 25  # characters around a number in which a word must say what it is
REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "IN")


class Finding(NamedTuple):
    """Characters `start` to `end` of a text, what they are, and how sure that is (0 to 1)."""

    start: int
    end: int
    kind: str
    score: float


@dataclass(frozen=True)
class Entity:
    """One kind of personal data: Presidio's recogniser of it, and the gate, a pattern of Rust's `regex`, that a text must pass.

    `beside`: a number whose form says little, and whose checksum is right by chance too often (one in ten or eleven). It
    counts where a word of the recogniser's own list of context, or one of `words`, stands near it.
    """

    recogniser: str
    gate: str
    beside: bool = False
    words: tuple[str, ...] = ()


_SHORT = r"\d(?:[ ._-]?\d){5}"
_NUMBER = r"\d(?:[ ._/-]?\d){7}"
_SEVEN = r"\d(?:[ ()./-]{0,2}\d){6}"
_DIGITS = re.compile(rf"(?:\+[ (]?|\()?(?<!\d){_SEVEN}(?:[ ()./-]{{0,2}}\d)*")
ENTITIES: dict[str, Entity] = {
    "CREDIT_CARD": Entity("CreditCardRecognizer", r"\d(?:[ -]?\d){11}"),
    "IBAN_CODE": Entity("IbanRecognizer", r"[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2}"),
    "EMAIL_ADDRESS": Entity("EmailRecognizer", r"\S@\S"),
    "PHONE_NUMBER": Entity("", _SEVEN),
    "IP_ADDRESS": Entity("IpRecognizer", r"\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]*:[0-9A-Fa-f]"),
    "CRYPTO": Entity("CryptoRecognizer", r"(?:bc1|[13])[a-zA-HJ-NP-Z0-9]{25}"),
    "US_SSN": Entity("UsSsnRecognizer", r"\d{3}[- .]\d{2}[- .]\d{4}"),
    "ES_NIF": Entity("EsNifRecognizer", r"\d{7}-?[A-Za-z]"),
    "ES_NIE": Entity("EsNieRecognizer", r"[X-Zx-z]\d{7}-?[A-Za-z]"),
    "IT_FISCAL_CODE": Entity("ItFiscalCodeRecognizer", r"(?i)[A-Z]{6}[0-9L-V]{2}[A-EHLMPR-T][0-9L-V]{2}[A-Z][0-9L-V]{3}[A-Z]"),
    "FI_PERSONAL_IDENTITY_CODE": Entity("FiPersonalIdentityCodeRecognizer", r"\d{6}[-+A-Fa-fU-Yu-y]\d{3}"),
    "UK_NHS": Entity("NhsRecognizer", _NUMBER, beside=True),
    "UK_NINO": Entity("UkNinoRecognizer", r"[A-Za-z]{2} ?\d{2} ?\d{2} ?\d{2}", beside=True),
    "CA_SIN": Entity("CaSinRecognizer", _NUMBER, beside=True),
    "AU_TFN": Entity("AuTfnRecognizer", _NUMBER, beside=True),
    "AU_MEDICARE": Entity("AuMedicareRecognizer", _NUMBER, beside=True),
    "DE_TAX_ID": Entity("DeTaxIdRecognizer", _NUMBER, beside=True, words=("tax id", "tax number")),
    "DE_SOCIAL_SECURITY": Entity("DeSocialSecurityRecognizer", r"\d{8}[A-Za-z]\d{3}", beside=True, words=("social security",)),
    "PL_PESEL": Entity("PlPeselRecognizer", _NUMBER, beside=True),
    "SE_PERSONNUMMER": Entity("SePersonnummerRecognizer", _NUMBER, beside=True),
    "TR_NATIONAL_ID": Entity("TrNationalIdRecognizer", _NUMBER, beside=True, words=("national id", "kimlik")),
    "IN_AADHAAR": Entity("InAadhaarRecognizer", _NUMBER, beside=True),
    "IN_PAN": Entity("InPanRecognizer", r"[A-Za-z]{5}\d{4}[A-Za-z]", beside=True),
    "KR_RRN": Entity("KrRrnRecognizer", _NUMBER, beside=True),
    "TH_TNIN": Entity("ThTninRecognizer", _NUMBER, beside=True),
    "SG_NRIC_FIN": Entity("SgFinRecognizer", r"[A-Za-z]\d{7}[A-Za-z]", beside=True),
    "ZA_ID_NUMBER": Entity("ZaIdNumberRecognizer", _NUMBER, beside=True),
    "NG_NIN": Entity("NgNinRecognizer", _NUMBER, beside=True),
    "US_ITIN": Entity("UsItinRecognizer", _NUMBER, beside=True),
    "US_PASSPORT": Entity("UsPassportRecognizer", _NUMBER, beside=True),
    "UK_PASSPORT": Entity("UkPassportRecognizer", r"[A-Za-z]{2}\d{7}", beside=True),
    "ABA_ROUTING_NUMBER": Entity("AbaRoutingRecognizer", _NUMBER, beside=True),
    # Form alone and no checksum: not among the defaults.
    "MAC_ADDRESS": Entity("MacAddressRecognizer", r"[0-9A-Fa-f]{2}[:-][0-9A-Fa-f]{2}[:-]|[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}"),
    "US_BANK_NUMBER": Entity("UsBankRecognizer", _NUMBER, beside=True),
    "US_DRIVER_LICENSE": Entity("UsLicenseRecognizer", _SHORT, beside=True),
    "MEDICAL_LICENSE": Entity("MedicalLicenseRecognizer", r"[A-Za-z]{2}\d{7}"),
    "DATE_TIME": Entity("DateRecognizer", r"\d[-/.]\w{1,9}[-/.]\d"),
    "URL": Entity("UrlRecognizer", r"\w\.\w{2}"),
}
NOT_BY_DEFAULT = ("MAC_ADDRESS", "US_BANK_NUMBER", "US_DRIVER_LICENSE", "US_PASSPORT", "UK_PASSPORT", "MEDICAL_LICENSE", "DATE_TIME", "URL")
DEFAULT = tuple(entity for entity in ENTITIES if entity not in NOT_BY_DEFAULT)
BESIDE = 0.75  # how sure a number is that a word beside it names: more than its form alone would be, less than a long checksum
_PHONE_WORDS = (
    "phone",
    "tel",
    "telephone",
    "mobile",
    "cell",
    "call",
    "fax",
    "whatsapp",
    "sms",
    "handy",
    "telefon",
    "móvil",
)
_PLAIN_NUMBER, _INTERNATIONAL = 0.6, 1.0


def gate(text: pl.Expr, entities: Iterable[str]) -> pl.Expr:
    """A list, a row of `text`, of those of `entities` that may stand in it."""
    flags = [pl.when(text.str.contains(ENTITIES[entity].gate) & _named(text, entity)).then(pl.lit(entity)) for entity in entities]
    return pl.concat_list(flags).list.drop_nulls() if flags else pl.lit([], dtype=pl.List(pl.String))


def find(text: str, entities: Iterable[str], regions: tuple[str, ...] = REGIONS) -> list[Finding]:
    """What stands in a text of these entities, in the order of places; a text at a time."""
    found: set[Finding] = set()
    for at, piece in pieces(text):
        for entity in entities:
            found |= {Finding(at + start, at + end, entity, score) for start, end, score in _looked_for(entity, piece, regions)}
    return sorted(found)


def names_in(texts: list[str], model: str, kinds: Iterable[str]) -> list[list[Finding]]:
    """The names of persons and places in each text, by a spaCy model; the first 100,000 characters of a text, in batches of 64."""
    wanted = set(kinds)
    found = []
    for document in pipeline(model).pipe([text[:100_000] for text in texts], batch_size=64):
        spans = [(entity.start_char, entity.end_char, _OF_MODEL.get(entity.label_, entity.label_)) for entity in document.ents]
        found.append([Finding(start, end, kind, NAMED) for start, end, kind in spans if kind in wanted])
    return found


@cache
def pipeline(model: str) -> Any:
    """The spaCy pipeline of that name or in that folder; GristmillError where it is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise missing() from error
    try:
        return spacy.load(model, exclude=["lemmatizer"])
    except OSError as error:
        raise GristmillError(
            f"the spaCy model {model!r} is not installed",
            where="safety.names",
            next=f"Install it: python -m spacy download {model}; or name the folder of one.",
        ) from error


def missing() -> GristmillError:
    """What to say where the extra is not installed."""
    return GristmillError("personal data and secrets are found by packages that are not installed", next="pip install 'gristmill[safety]'")


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """A long text in pieces that overlap, each with the place where it begins: what bounds the time that a hostile text takes."""
    if len(text) <= 2 * PIECE:
        yield 0, text
        return
    for at in range(0, len(text), PIECE - OVERLAP):
        yield at, text[at : at + PIECE]


def _looked_for(entity: str, text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int, float]]:
    if entity == "PHONE_NUMBER":
        yield from _phones(text, regions)
        return
    recogniser, words = _recogniser(entity)
    for result in recogniser.analyze(text, [entity]):
        if not ENTITIES[entity].beside:
            yield result.start, result.end, result.score
        elif _beside(words, text, result.start, result.end):
            yield result.start, result.end, max(result.score, BESIDE) if result.score < 1 else BESIDE


def _beside(words: re.Pattern[str], text: str, start: int, end: int) -> bool:
    return bool(words.search(text[max(0, start - BEFORE) : start]) or words.search(text[end : end + BEHIND]))


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int, float]]:
    """Numbers that are valid and written in the groups of their country.

    Those that begin with + or 0, or have brackets or marks between the groups, count by themselves; any other needs a word beside it.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    words = _one_of(_PHONE_WORDS)
    for run in _DIGITS.finditer(text):  # the matcher is slow, and tries every number of what it is given
        at = max(0, run.start() - 2)
        for region in regions or (None,):
            for match in PhoneNumberMatcher(text[at : run.end() + 2], region, leniency=Leniency.EXACT_GROUPING):
                start, end = at + match.start, at + match.end
                if match.raw_string.startswith("+"):
                    yield start, end, _INTERNATIONAL
                elif re.search(r"^0\d+\D|[()/.-]", match.raw_string) or _beside(words, text, start, end):
                    yield start, end, _PLAIN_NUMBER


@cache
def _recogniser(entity: str) -> tuple[Any, re.Pattern[str]]:
    """Presidio's recogniser of an entity, and the words of which one must stand beside what it finds."""
    from importlib import import_module

    try:
        recognisers = import_module(PRESIDIO)
    except ImportError as error:
        raise missing() from error
    made = getattr(recognisers, ENTITIES[entity].recogniser)()
    if entity == "EMAIL_ADDRESS":  # its own check fetches a list of public suffixes from the network
        made.validate_result = _is_address
    elif entity == "IP_ADDRESS":  # its own check lets private and reserved addresses pass
        made.invalidate_result = _is_nobodys
    return made, _one_of(ENTITIES[entity].words + tuple(made.context or ()))


@cache
def _words_beside(entity: str) -> str:
    return _recogniser(entity)[1].pattern


def _named(text: pl.Expr, entity: str) -> pl.Expr:
    return text.str.contains(f"(?i){_words_beside(entity)}") if ENTITIES[entity].beside else pl.lit(True)


@cache
def _one_of(words: tuple[str, ...]) -> re.Pattern[str]:
    listed = "|".join(sorted((re.escape(word.strip()) for word in words), key=len, reverse=True))
    return re.compile(rf"\b(?:{listed})\b", re.IGNORECASE)


@cache
def _suffixes() -> Callable[[str], Any]:
    from tldextract import TLDExtract

    extract: Callable[[str], Any] = TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list that the package brings along
    return extract


def _is_address(text: str) -> bool:
    return bool(_suffixes()(text).fqdn)


def _is_nobodys(text: str) -> bool:
    from ipaddress import ip_address

    try:
        return not ip_address(text.split("/")[0].strip()).is_global
    except ValueError:
        return True
