"""Data sets of Hugging Face's library `datasets`: parquet files, folders that it saved, names on the hub.

The library turns parquet and downloads into Arrow files in its cache, once, which it maps into memory: any row can be
read at once, which the exact shuffle and resumption of `gans.data.loading` need. (In parquet a row group has to be
unpacked for one of its rows; a stream from the hub shuffles within a buffer, which a resumed run does not get back.)
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from gans.common.files import mark_of
from gans.data.decoding import MAX_BYTES, decode
from gans.data.file_images import check_whole
from gans.data.labels import NamedImages, number_classes

HUB = "hf:"
SAVED = ("dataset_dict.json", "state.json")
"""Files of folders that `save_to_disk` has written, of several splits and of one."""


class TableImages(NamedImages):
    """The images in a column of a `datasets.Dataset`, and the labels in another.

    Images are the column of the feature type Image, or of encoded files as bytes, alone or in the pair (bytes, path)
    that Image is in parquet; if there are several, the one called "image". Labels are the column of the type
    ClassLabel, or else the one called "label".
    """

    def __init__(self, dataset: Any, data: str, files: Sequence[Path] = ()) -> None:
        import datasets

        self.data = data
        self._files = files
        self._dataset = dataset
        images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        images = images or [name for name, kind in dataset.features.items() if _is_bytes(kind) or _is_file(kind)]
        self._column = _only(images, "image", f"data {data!r} has", "images", dataset.column_names)
        self._images = dataset.select_columns(self._column)
        if isinstance(dataset.features[self._column], datasets.Image):
            self._images = self._images.cast_column(self._column, datasets.Image(decode=False))
        self.names = [str(i) for i in range(len(dataset))]

    def open(self, index: int) -> Image.Image:
        return decode(lambda: self._contents(index), self._called(index))

    def marks(self) -> Iterator[bytes]:
        for entry in self._dataset.cache_files:
            yield mark_of(entry["filename"], Path(entry["filename"]))
        yield str(len(self)).encode()

    def _contents(self, index: int) -> bytes:
        value = self._images[index][self._column]
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        if value is None:
            raise ValueError("the row has none")
        if len(value) > MAX_BYTES:
            raise ValueError(f"it has {len(value):,} bytes; at most {MAX_BYTES:,} are read")
        return value

    def _called(self, index: int) -> str:
        """Row and data; of parquet files, the row in its file."""
        if not self._files:
            return f"in row {index} of {self.data!r}"
        file = bisect.bisect_right(self._ends, index)
        first = self._ends[file - 1] if file else 0
        return f"in row {index - first} of {str(self._files[file])!r}"

    @cached_property
    def _ends(self) -> list[int]:
        """The number of the row after each parquet file's last."""
        from pyarrow import parquet

        return list(itertools.accumulate(parquet.ParquetFile(file).metadata.num_rows for file in self._files))

    def find_labels(self) -> tuple[list[int] | None, list[str]]:
        import datasets

        features = self._dataset.features
        columns = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        columns = columns or [name for name in ("label",) if name in features]
        if not columns:
            return None, []
        column = _only(columns, "label", f"data {self.data!r} has", "labels", columns)
        values = list(self._dataset[column])
        called = dict(enumerate(getattr(features[column], "names", ())))
        return number_classes(values, lambda index: f"the image {self._called(index)}", called)


def _is_bytes(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _is_file(kind: Any) -> bool:
    """Whether it is what Image is in parquet, where other programs wrote no word of that type."""
    return isinstance(kind, dict) and kind.keys() == {"bytes", "path"} and _is_bytes(kind["bytes"])


def _only(names: Sequence[str], usual: str, whose: str, what: str, columns: Sequence[str]) -> str:
    """The only name, or the usual one; ValueError where there is no such column."""
    if len(names) == 1:
        return names[0]
    if usual in names:
        return usual
    if not names:
        raise ValueError(f"{whose} no column of {what}; its columns are {', '.join(columns)}")
    raise ValueError(
        f"{whose} several columns of {what}, {', '.join(names)}: call one of them {usual!r} (rename_column and "
        "save_to_disk of the library datasets)"
    )


def _load(data: str, load: Callable[[Any], Any]) -> Any:
    """What `load` does with the library; ValueError where that fails."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"data is {data!r}, which needs the package {error.name}: pip install '.[data]'") from error
    try:
        return load(datasets)
    except Exception as error:  # the library and those under it raise all sorts
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"data {data!r} cannot be read: {error}{cause}") from error


def _columns(file: str) -> frozenset[str]:
    """The names of a parquet file's columns; none if it has no rows."""
    from pyarrow import parquet

    found = parquet.ParquetFile(file)
    return frozenset(found.schema_arrow.names if found.metadata.num_rows else ())


def from_parquet(files: Sequence[Path], data: str) -> TableImages:
    """The images in parquet files, in the order of the files."""
    names = [str(file) for file in files]
    columns = {
        name: columns for name, columns in _load(data, lambda _: [(name, _columns(name)) for name in names]) if columns
    }
    if not columns:
        raise ValueError(f"data {data!r} has no images: its files have no rows")
    first, *others = columns
    for other in others:
        if columns[other] != columns[first]:
            raise ValueError(
                f"data {data!r} has files with different columns: {', '.join(sorted(columns[first]))} in {first!r}, "
                f"and {', '.join(sorted(columns[other]))} in {other!r}"
            )
    loaded = _load(data, lambda datasets: datasets.load_dataset("parquet", data_files=names, split="train"))
    return TableImages(loaded, data, files)


def from_saved(folder: Path, split: str) -> TableImages:
    """The images in a folder that `save_to_disk` has written."""
    loaded = _load(str(folder), lambda datasets: datasets.load_from_disk(str(folder)))
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ValueError(f"split {split!r} is not in {str(folder)!r}, which has {', '.join(loaded)}")
        loaded = loaded[split]
    else:
        check_whole(split, set(), folder)
    return TableImages(loaded, str(folder))


def from_hub(data: str, split: str) -> TableImages:
    """The images of a data set on the hub, `hf:NAME`, `hf:NAME:SUBSET` or `hf:NAME@REVISION`, downloaded if need be."""
    found = re.fullmatch(r"hf:([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", data)
    if not found:
        raise ValueError(f"data is {data!r}; a data set of the hub is hf:NAME, hf:NAME:SUBSET or hf:NAME@REVISION")
    name, subset, revision = found.groups()
    loaded = _load(data, lambda datasets: datasets.load_dataset(name, subset, revision=revision, split=split))
    return TableImages(loaded, data)
