"""WebDataset shards: tar files in which the members of a sample have a name in common up to the first dot.

A shard is not streamed. Its members are listed once, by the standard library, and read where they lie: so images come
in any order, the exact shuffle and resumption of `gans.data.loading` hold, and what processes divide among them is that
order. (A stream shuffles within a buffer, which a resumed run would have to fill as it was, and gives every process
shards of its own, so that the order depends on the number of processes.)

Labels are, in this order, those of a table in a shard (`dataset.json`...), of the members beside each image, or the
names of folders in the shards. `0001.json` beside the image `0001.png` may have `label`, a number or a name, and
`class_name`, the name of that number; null says nothing. `0001.cls` has a number, which counts where `0001.json` has no
label, and must be the same beside a number there.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gans.common.files import mark_of
from gans.data.file_images import FileImages, leads_out
from gans.data.labels import ClassNames

BLOCK = 512


def key_of(name: str) -> str:
    """What the members of a sample have in common: the name up to the first dot that comes after the folders."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, place and size in bytes of every file in a tar file without compression.

    Raises ValueError, which names the shard, if it is something else, damaged or cut off, or has links or names
    that lead out of it.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.islnk() or member.issym() or member.issparse():
                    what = "a sparse file" if member.issparse() else "a link"
                    raise ValueError(f"it has {what}, {member.name!r}, in the place of the contents; pack it without")
                if leads_out(member.name):
                    raise ValueError(f"it has a member that leads out of it, {member.name!r}; pack it with other names")
                if member.isfile():
                    yield PurePosixPath(member.name).as_posix(), member.offset_data, member.size
            end = archive.offset
        # tarfile ends without a word where a head is damaged, and where a copy was cut off between two members.
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise ValueError(f"it has no tar head nor end mark at byte {end:,}: it is damaged or was cut off")
            while rest := file.read(2**20):
                if rest.count(0) < len(rest):
                    raise ValueError(
                        f"it goes on after its end mark at byte {end:,}, as two that cat has joined: give both by a "
                        "pattern instead, or join them by tar --concatenate"
                    )
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"shard {str(shard)!r} cannot be read as a tar file without compression: {error}") from error


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that all lie in."""
    return Path(os.path.commonpath([file.parent for file in files]))


class ShardImages(FileImages):
    """Every image in tar files, named by shard and member; messages call all of them `data`."""

    def __init__(self, shards: Sequence[Path], data: str) -> None:
        root = common_folder(shards)
        self._shards = {shard.relative_to(root).as_posix(): shard for shard in shards}
        self._places: dict[str, tuple[str, int, int]] = {}
        for called, shard in self._shards.items():
            for member, place, size in members(shard):
                name = f"{called}/{member}"
                if name in self._places:
                    raise ValueError(f"shard {str(shard)!r} has {member!r} twice")
                self._places[name] = called, place, size
        super().__init__(Path(data), self._places)
        for one, other in itertools.pairwise(self.names):
            if key_of(one) == key_of(other):
                shard, first = self._split(one)
                raise ValueError(
                    f"shard {str(shard)!r} has two images of one sample (the same name up to the first dot), {first!r} "
                    f"and {self._split(other)[1]!r}; a sample has one"
                )

    def size_of(self, name: str) -> int:
        return self._places[name][2]

    def read(self, name: str, size: int) -> bytes:
        called, place, _ = self._places[name]
        with self._shards[called].open("rb") as file:
            file.seek(place)
            return file.read(size)

    def called(self, name: str) -> str:
        shard, member = self._split(name)
        return f"{member!r} of shard {str(shard)!r}"

    def folder_of(self, name: str) -> str:
        return PurePosixPath(self._split(name)[1]).parent.name

    def own_labels(self, called: ClassNames) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        for name in self.names:
            about = self._about(key_of(name))
            if (label := about.get("label")) is None:
                continue
            labels[name] = label
            if isinstance(label, int) and "class_name" in about:
                called.add(label, str(about["class_name"]), self.called(f"{key_of(name)}.json"))
        return labels

    def _about(self, key: str) -> dict[str, Any]:
        """What the members beside an image say of it."""
        member = f"{key}.json"
        about: dict[str, Any] = {}
        number = None
        try:
            if member in self._places:
                found = json.loads(self.contents(member))
                if isinstance(found, dict):
                    about = {name: value for name, value in found.items() if value is not None}
            member = f"{key}.cls"
            if isinstance(about.get("label", 0), int) and member in self._places:
                number = int(self.contents(member))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"cannot read the label {self.called(member)}: {error!r}") from error
        if number is not None and (label := about.setdefault("label", number)) != number:
            raise ValueError(
                f"the label is {label} by {self.called(f'{key}.json')}, and {number} by {self.called(member)}; they "
                "must agree"
            )
        return about

    def marks(self) -> Iterator[bytes]:
        for called, shard in self._shards.items():
            yield mark_of(called, shard)
        yield from (name.encode() for name in self.names)

    def _split(self, name: str) -> tuple[Path, str]:
        """Shard and member."""
        called = self._places[name][0]
        return self._shards[called], name.removeprefix(f"{called}/")
