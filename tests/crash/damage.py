"""Ways in which a checkpoint on disk can be damaged, each of which leaves a folder that looks like one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Damage(NamedTuple):
    """What was done to a checkpoint: to which file, of what kind, what exactly, and how."""

    file: str
    kind: str
    what: str
    do: Callable[[Path], object]


def files_of(checkpoint: Path) -> list[str]:
    """The paths of all files, the manifest too."""
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def damages(checkpoint: Path, other: Path) -> Iterator[Damage]:
    """Everything that is done to each file of `checkpoint`; `other` is an older checkpoint of the same run."""
    names = files_of(checkpoint)
    for name in names:
        size = (checkpoint / name).stat().st_size
        for bit in {0, 8 * (size // 2) + 3, 8 * size - 1}:
            yield Damage(
                name, "flip", f"bit {bit} flipped", lambda folder, name=name, bit=bit: flip(folder / name, bit)
            )
        for left in {0, size // 2, size - 1}:
            yield Damage(
                name, "cut", f"cut to {left} bytes", lambda folder, name=name, left=left: cut(folder / name, left)
            )
        yield Damage(name, "longer", "a byte more", lambda folder, name=name: append(folder / name))
        yield Damage(name, "delete", "deleted", lambda folder, name=name: (folder / name).unlink())
        yield Damage(name, "link", "a link to itself elsewhere", lambda folder, name=name: link(folder / name))
        if (checkpoint / name).read_bytes() != (other / name).read_bytes():
            yield Damage(
                name, "other", "that of another", lambda folder, name=name: shutil.copyfile(other / name, folder / name)
            )
    alike = [name for name in names if name.endswith(".safetensors")]
    for one, two in zip(names, [*names[1:], alike[0]], strict=True):
        if one != two:
            yield Damage(
                one, "swap", f"swapped with {two}", lambda folder, one=one, two=two: swap(folder / one, folder / two)
            )
    yield Damage(
        "more.safetensors", "extra", "another file", lambda folder: (folder / "more.safetensors").write_bytes(b"x")
    )
    yield Damage(
        "sub/more", "extra", "another file", lambda folder: [(folder / "sub").mkdir(), append(folder / "sub" / "more")]
    )


def flip(path: Path, bit: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path, left: int) -> None:
    """Keep the first bytes."""
    path.write_bytes(path.read_bytes()[:left])


def append(path: Path) -> None:
    """Add a byte, or make the file."""
    with path.open("ab") as file:
        file.write(b"x")


def link(path: Path) -> None:
    """Put the file beside the checkpoint, and a link to it in its place."""
    target = path.rename(path.parents[1] / f"moved-{path.name}")
    path.symlink_to(target)


def swap(one: Path, two: Path) -> None:
    """Give two files each other's names."""
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
