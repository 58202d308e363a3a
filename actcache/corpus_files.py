"""Which files a corpus is, and of which format: by their names, or as the user says.

What names leave open is refused with the way out, never guessed: a suffix that may be several things, a directory of
several kinds or with several splits. Nothing is opened here but the JSON of a `save_to_disk` directory.
`actcache.sources` reads the files.
"""

import json
import re
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from .errors import CorpusError
from .retry import client_errors
from .spec import Corpus, public_text, public_url

_ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_TEXT = frozenset(
    (
        *(["txt", "text", "md", "markdown", "rst", "tex", "org", "log", "adoc"]),
        *(
            [
                "py",
                "pyi",
                "c",
                "h",
                "cc",
                "cpp",
                "cxx",
                "hpp",
                "hh",
                "cs",
                "java",
                "js",
                "mjs",
                "jsx",
                "ts",
                "tsx",
                "go",
                "rs",
                "rb",
                "php",
                "pl",
                "pm",
                "sh",
                "bash",
                "zsh",
                "fish",
                "ps1",
            ]
        ),
        *(
            [
                "sql",
                "r",
                "jl",
                "scala",
                "kt",
                "kts",
                "swift",
                "m",
                "mm",
                "lua",
                "hs",
                "ml",
                "mli",
                "ex",
                "exs",
                "erl",
                "clj",
                "cljs",
                "lisp",
                "el",
                "scm",
                "rkt",
                "vim",
                "dart",
                "nim",
                "zig",
            ]
        ),
        *(
            [
                "cu",
                "cuh",
                "asm",
                "s",
                "f",
                "f90",
                "f95",
                "for",
                "pas",
                "vb",
                "v",
                "sv",
                "vhd",
                "vhdl",
                "tf",
                "proto",
                "thrift",
                "cmake",
                "gradle",
                "mk",
                "bzl",
                "css",
                "scss",
                "less",
            ]
        ),
        *(["yaml", "yml", "toml", "ini", "cfg", "conf", "properties"]),
    )
)
"""Suffixes of files that are one document each."""
_HINTS = {
    ".json": "it may hold a document a line (format='jsonl'), one array (write a document a line first: jq -c '.[]'), "
    "or be one document (format='text')",
    ".csv": "write it as parquet first (pyarrow.csv.read_csv, then pyarrow.parquet.write_table)",
}
_HINTS[".tsv"] = _HINTS[".csv"]
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders that `datasets` takes for a split."""
_REPOSITORY = re.compile(
    r"(readme|license|citation|changelog|dataset_infos?)(\..*)?|.*\.(md|py)", re.IGNORECASE
)
"""Files of a Hugging Face repository that are about the data."""


def find_files(corpus: Corpus, options: Mapping[str, Any]) -> tuple[list[str], str]:
    """The files of a corpus (fsspec URLs or local paths) in reading order, and their one format.

    Raises:
        CorpusError: nothing matches, or names do not tell what the files are.
    """
    if corpus.source == "bundled:stdlib":
        return _stdlib_files(), "text"
    if corpus.source.startswith("bundled:"):
        raise CorpusError(f"corpus {corpus.source!r} is not bundled; the only one is bundled:stdlib")
    fs, path = filesystem(corpus.source, options)
    try:
        if fs.isdir(path):
            files = _saved_dataset(fs, path, corpus) or _directory(fs, path, corpus)
        elif is_local_filesystem(fs) and fs.isfile(path):
            files = [path]  # also where its name looks like a glob
        else:
            files = sorted(f for f in fs.glob(path) if not fs.isdir(f))
    except client_errors() as err:
        raise CorpusError(
            f"cannot list corpus {corpus.shown!r}: {public_text(err)}. Check the URL and the credentials"
        ) from public_cause(err)
    if not files:
        raise CorpusError(
            f"no file matches corpus {corpus.shown!r}; give a file, a directory, a glob or a URL"
        )
    found = corpus.format or _only_format(files, corpus)
    return [fs.unstrip_protocol(f) if "://" in corpus.source else f for f in files], found


def filesystem(source: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL or path, and the path in it."""
    try:
        fs, path = fsspec.core.url_to_fs(source, **options)
    except (ValueError, ImportError, OSError) as err:
        raise CorpusError(
            f"cannot open corpus {public_url(source)!r}: {public_text(err)}. Check the URL and the credentials"
        ) from public_cause(err)
    return fs, path


def public_cause(err: BaseException) -> BaseException | None:
    """What to raise from: the error, unless it or one that it came from names a credential."""
    seen: BaseException | None = err
    while seen is not None:
        if public_text(seen) != str(seen):
            return None
        seen = seen.__cause__ or seen.__context__
    return err


def is_local_filesystem(fs: Any) -> bool:
    """Whether it is this machine's."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def format_of(file: str) -> str | None:
    """text, jsonl, parquet or arrow by the name of a file; None if it does not tell."""
    web = file.startswith(("http://", "https://"))
    for name in (public_url(file),) if web else (file, public_url(file)):  # a query follows the suffix
        stem, suffix, packed = _suffix(name)
        kind = _ROWS.get(suffix) or ("text" if suffix[1:] in _TEXT else None)
        if stem and kind and (not packed or kind in ("text", "jsonl")):
            return kind
    return None


def _suffix(file: str) -> tuple[str, str, bool]:
    """Name without its suffix, and the suffix, both in lower case; whether `.gz` or `.zst` follows."""
    name = file.rpartition("/")[2].lower()
    inner = name.removesuffix(".gz").removesuffix(".zst")
    stem, dot, suffix = inner.rpartition(".")
    return (stem, dot + suffix, inner != name) if dot else (inner, "", inner != name)


def _only_format(files: Sequence[str], corpus: Corpus) -> str:
    """The format of all files.

    Raises:
        CorpusError: a name does not tell it, or they are of several.
    """
    examples: dict[str | None, str] = {}
    counts: Counter[str | None] = Counter()
    for file in files:
        kind = format_of(file)
        counts[kind] += 1
        examples.setdefault(kind, public_url(file))
    unknown = examples.get(None)
    if len(counts) == 1 and unknown is None:
        return str(next(iter(counts)))
    if len(counts) == 1 and unknown is not None:
        hint = _HINTS.get(
            _suffix(unknown)[1], "format='text' takes each file as one document, format='jsonl' each line"
        )
        raise CorpusError(
            f"corpus {corpus.shown!r}: the name of {unknown} does not tell its format: {hint}; on the command line "
            "--format"
        )
    names = ", ".join(sorted(kind or "unknown" for kind in counts))
    shown = ", ".join(
        f"{counts[kind]} {kind or 'unknown'} such as {PurePosixPath(file).name}"
        for kind, file in sorted(examples.items(), key=lambda item: item[0] or "~")
    )
    example = PurePosixPath(examples[next(kind for kind in counts if kind)]).name
    raise CorpusError(
        f"corpus {corpus.shown!r} matches files of formats {names} ({shown}); give a glob of one, such as "
        f"{_within(corpus.shown)}/**/*{example[len(_suffix(example)[0]) :]}, or say by format= (--format) as what all of "
        "them are to be read"
    )


def _within(shown: str) -> str:
    """The folder that a source is, or in which its glob begins."""
    parts = shown.rstrip("/").split("/")
    while len(parts) > 1 and (re.search(r"[*?\[]", parts[-1]) or format_of(parts[-1])):
        parts.pop()
    return "/".join(parts)


def _directory(fs: Any, path: str, corpus: Corpus) -> list[str]:
    """The files of a directory, in order; those that are hidden, and what is about a Hub repository, left out.

    Raises:
        CorpusError: there are files of several splits or, on the Hub, in several folders.
    """
    depth = len(fs._strip_protocol(path).rstrip("/").split("/"))
    inside = {file: file.split("/")[depth:] for file in sorted(fs.find(path))}
    inside = {
        file: parts for file, parts in inside.items() if not any(part.startswith(".") for part in parts)
    }
    hub = corpus.source.startswith("hf://")
    if hub:
        inside = {file: parts for file, parts in inside.items() if not _REPOSITORY.fullmatch(parts[-1])}
        folders = sorted({"/".join(parts[:-1]) for parts in inside.values()})
        if len(folders) > 1:
            raise _several(
                "folders (configurations, perhaps)", [f or "." for f in folders], folders[-1], corpus
            )
    if any((corpus.format or format_of(file)) in _ROWS.values() for file in inside):
        splits = {split: parts for parts in inside.values() for split in _splits(parts)}
        if len(splits) > 1:
            example = splits.get("train") or next(iter(splits.values()))
            raise _several("splits", sorted(splits), f"**/{example[-1]}", corpus)
    return list(inside)


def _splits(parts: Sequence[str]) -> set[str]:
    """The splits that the names of a file and its folders speak of."""
    words = (word for part in parts for word in re.split("[^a-z]+", part.lower()))
    return {_SPLITS[word] for word in words if word in _SPLITS}


def _several(what: str, found: Sequence[str], example: str, corpus: Corpus) -> CorpusError:
    more = ", ..." if len(found) > 6 else ""
    folder = corpus.shown.rstrip("/")
    return CorpusError(
        f"corpus {corpus.shown!r} holds several {what}: {', '.join(found[:6])}{more}; give one, such as "
        f"{folder}/{example}, or a glob of all that you want, such as {folder}/**/*.parquet"
    )


def _saved_dataset(fs: Any, path: str, corpus: Corpus) -> list[str] | None:
    """The files of a directory that `datasets.Dataset.save_to_disk` wrote, in its order; else None."""
    if fs.exists(f"{path}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{path}/dataset_dict.json"))["splits"]
        raise CorpusError(
            f"corpus {corpus.shown!r} holds the splits {', '.join(splits)}; give the directory of one, "
            f"e.g. {corpus.shown.rstrip('/')}/{splits[0]}"
        )
    if not fs.exists(f"{path}/state.json"):
        return None
    state = json.loads(fs.cat_file(f"{path}/state.json"))
    if state.get("_indices_data_files"):
        raise CorpusError(
            f"corpus {corpus.shown!r} was saved with an indices mapping; save it again, flattened"
        )
    names = [str(item["filename"]) for item in state["_data_files"]]
    if any("/" in name or "\\" in name for name in names):
        raise CorpusError(f"corpus {corpus.shown!r}: its state.json names files of other directories")
    return [f"{path}/{name}" for name in names]


def _stdlib_files() -> list[str]:
    """The running interpreter's standard library sources, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts)]
    return [str(p) for p in sorted(found, key=lambda p: p.relative_to(root).as_posix())]
