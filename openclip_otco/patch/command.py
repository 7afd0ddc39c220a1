"""`openclip-otco patch`: gives OpenCLIP's training script its plugin point, and takes it away again."""

import argparse
import errno
import sys
from pathlib import Path

from openclip_otco.patch.diff import PACKAGE, PatchError
from openclip_otco.patch.installation import DISTRIBUTION, State, Status, apply, cure, revert, shadow, status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `openclip-otco patch`."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--status", action="store_true", help="say if OpenCLIP is patched (exit code 0) or not (1)")
    action.add_argument("--dry-run", action="store_true", help="name the files that would change")
    action.add_argument("--revert", action="store_true", help="restore OpenCLIP's own files")
    parser.add_argument("--target", type=Path, metavar="DIR", help=f"folder of {PACKAGE} (default: the installed one)")
    parser.add_argument("--version", help=f"version of {DISTRIBUTION} (default: the installed one)")


def run(args: argparse.Namespace) -> int:
    """`openclip-otco patch`: returns the exit code."""
    try:
        before = status(args.target, args.version)
        if args.status:
            return _print_status(before, args.target)
        changed = (revert if args.revert else apply)(args.target, args.version, dry_run=args.dry_run)
    except PatchError as error:
        print(f"openclip-otco patch: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or "OpenCLIP's folder"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free some space" if full else "make it writable, or install into a virtual environment of your own"
        print(f"openclip-otco patch: {where}: {error.strerror}; nothing was changed: {cure}", file=sys.stderr)
        return 1
    goal = "unpatched" if args.revert else "patched"
    if not changed:
        print(f"{DISTRIBUTION} {before.version} in {before.folder} is already {goal}")
    else:
        print(f"{DISTRIBUTION} {before.version} in {before.folder} {'would be' if args.dry_run else 'is now'} {goal}:")
        print("\n".join(f"  {path}" for path in changed))
    return 0


def _print_status(found: Status, target: Path | None) -> int:
    """Says what is trained by, and what `python -m` takes instead in this folder; 0 if all of it is patched."""
    copies = [found]
    if target is None and (here := shadow(found.folder)) is not None:
        copies.append(status(here, found.version))
    for copy in copies:
        hint = f"; {cure(copy)}" if copy is found and copy.state in (State.OUTDATED, State.MODIFIED) else ""
        print(f"{copy.state.value}: {DISTRIBUTION} {copy.version or '?'} in {copy.folder or '?'}{hint}")
    if len(copies) > 1:
        print(f"In this folder, python -m {PACKAGE}.main takes the second one; openclip-otco train takes the first one")
    return 0 if all(copy.state is State.PATCHED for copy in copies) else 1
