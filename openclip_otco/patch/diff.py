"""A patch: the output of `git diff`, read, and carried out on the content of files."""

import hashlib
import re
from dataclasses import dataclass

PACKAGE = "open_clip_train"
# The packages whose files a patch may change; they lie in one folder.
PACKAGES = (PACKAGE, "open_clip")
NO_FILE = "0" * 40

_HEAD = re.compile(
    rb"(?:(?:new|deleted) file mode 100644\n)?"
    rb"index ([0-9a-f]{40})\.\.([0-9a-f]{40})(?: 100644)?\n"
    rb"--- (.+)\n"
    rb"\+\+\+ (.+)\n"
)
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*\n")


class PatchError(Exception):
    """Why nothing was changed, in one line for the user."""


@dataclass(frozen=True)
class Hunk:
    """One change of a file. Lines keep their line ends; the context is in both `old` and `new`."""

    old_start: int
    old: tuple[bytes, ...]
    new_start: int
    new: tuple[bytes, ...]

    def inverse(self) -> "Hunk":
        """What takes the change back."""
        return Hunk(self.new_start, self.new, self.old_start, self.old)


@dataclass(frozen=True)
class FilePatch:
    """The changes of one file: `path` is relative to the folder that holds the package, ids are git blob ids."""

    path: str
    old_id: str
    new_id: str
    hunks: tuple[Hunk, ...]

    def inverse(self) -> "FilePatch":
        """What takes the change back."""
        return FilePatch(self.path, self.new_id, self.old_id, tuple(hunk.inverse() for hunk in self.hunks))

    def apply(self, data: bytes | None) -> bytes | None:
        """Changes the content of the file; None stands for no file. Raises `PatchError` if this is not exact."""
        if blob_id(data) != self.old_id:
            raise PatchError(f"{self.path}: not the content that the patch is for")
        result = None if self.new_id == NO_FILE else _apply_hunks(data or b"", self.hunks, self.path)
        if blob_id(result) != self.new_id:
            raise PatchError(f"{self.path}: the patch does not give the content that it promises")
        return result


def parse_patch(text: bytes) -> list[FilePatch]:
    """Reads the output of `git diff --full-index`: text files that are changed, created or deleted, nothing else.

    Leading folders of the paths up to the package are dropped. Raises `PatchError` on anything that it does not know.
    """
    sections = re.split(rb"^diff --git .*\n", text, flags=re.MULTILINE)
    if sections[0]:
        raise PatchError("malformed patch: it does not begin with 'diff --git'")
    return [_parse_file(section) for section in sections[1:]]


def blob_id(data: bytes | None) -> str:
    """The id that git gives to a file's content; `NO_FILE` for None."""
    if data is None:
        return NO_FILE
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _apply_hunks(data: bytes, hunks: tuple[Hunk, ...], path: str) -> bytes:
    lines = _split_lines(data)
    result: list[bytes] = []
    position = 0
    for hunk in hunks:
        # Where a hunk has no old lines, its number is that of the line before it.
        start = hunk.old_start - 1 if hunk.old else hunk.old_start
        end = start + len(hunk.old)
        if start < position or tuple(lines[start:end]) != hunk.old:
            raise PatchError(f"{path}: line {hunk.old_start} is not what the patch expects")
        result += lines[position:start]
        result += hunk.new
        position = end
    return b"".join(result + lines[position:])


def _split_lines(data: bytes) -> list[bytes]:
    # bytes.splitlines also splits at a lone carriage return, which diff does not.
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _parse_file(section: bytes) -> FilePatch:
    head, *hunks = re.split(rb"^(?=@@ )", section, flags=re.MULTILINE)
    match = _HEAD.fullmatch(head)
    if match is None:
        raise PatchError(f"malformed patch: unknown file header {head!r}")
    old_id, new_id, *names = (group.decode() for group in match.groups())
    paths = {_package_path(name) for name in names if name != "/dev/null"}
    if len(paths) != 1:
        raise PatchError(f"malformed patch: a file named {' and '.join(names)}")
    return FilePatch(paths.pop(), old_id, new_id, tuple(_parse_hunk(hunk) for hunk in hunks))


def _package_path(name: str) -> str:
    match = re.fullmatch(rf"[ab]/(?:.*?/)?((?:{'|'.join(PACKAGES)})/.+)", name)
    if match is None or ".." in name.split("/"):
        raise PatchError(f"malformed patch: {name} is not in {' or '.join(PACKAGES)}")
    return match[1]


def _parse_hunk(text: bytes) -> Hunk:
    header, *body = _split_lines(text)
    match = _HUNK.fullmatch(header)
    if match is None:
        raise PatchError(f"malformed patch: unknown hunk header {header!r}")
    old_start, old_count, new_start, new_count = (1 if group is None else int(group) for group in match.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    sides: dict[bytes, list[list[bytes]]] = {b" ": [old, new], b"-": [old], b"+": [new]}
    last: list[list[bytes]] = []
    for line in body:
        if line.startswith(b"\\ "):
            # "No newline at end of file" is about the line above it.
            for side in last:
                side[-1] = side[-1].removesuffix(b"\n")
        elif line[:1] in sides:
            last = sides[line[:1]]
            for side in last:
                side.append(line[1:])
        else:
            raise PatchError(f"malformed patch: unknown line {line!r}")
    if (len(old), len(new)) != (old_count, new_count):
        raise PatchError(f"malformed patch: the hunk {header!r} does not have the lines that it announces")
    return Hunk(old_start, tuple(old), new_start, tuple(new))
