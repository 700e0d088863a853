"""The manifest of a conversion: every tensor's two names, with hashes of both forms."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from bridge.files import read_regular
from bridge.weights.safetensors_ import octets

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.weights/1"] = "jaxdw.weights/1"


class Form(pydantic.BaseModel):
    """A tensor in one framework, with the SHA-256 of its bytes, little-endian in C order."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Form:
        return cls(name=name, shape=array.shape, sha256=sha256(array))


class Moved(pydantic.BaseModel):
    """A tensor that both frameworks have."""

    dtype: str
    layout: str
    torch: Form
    flax: Form


class Kept(pydantic.BaseModel):
    """A tensor for which Flax has no place, such as `num_batches_tracked`: its bytes, for the conversion back."""

    dtype: str
    torch: Form
    data: str

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Kept:
        data = base64.b64encode(octets(array)).decode()
        return cls(dtype=array.dtype.name, torch=Form.of(name, array), data=data)

    def array(self) -> np.ndarray:
        array = np.frombuffer(bytearray(base64.b64decode(self.data)), self.dtype).reshape(self.torch.shape)
        if sha256(array) != self.torch.sha256:
            raise ValueError(f"the manifest's data of {self.torch.name!r} does not have the hash that it states")
        return array


class WeightsManifest(pydantic.BaseModel):
    """Every tensor of a conversion.

    Attributes:
      rules: the architecture whose rules were used, or another source of them.
      moved: tensors with a form in each framework.
      kept: tensors that only PyTorch has.
    """

    model_config = pydantic.ConfigDict(populate_by_name=True)

    schema_: Literal["jaxdw.weights/1"] = pydantic.Field(default=SCHEMA, alias="schema")
    rules: str
    moved: list[Moved]
    kept: list[Kept]

    @classmethod
    def read(cls, path: Path) -> WeightsManifest:
        """Read a manifest; raise ValueError where the file is none."""
        try:
            return cls.model_validate_json(read_regular(path))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no manifest of converted weights: {error}") from None

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def changed(self, flax: Mapping[str, np.ndarray]) -> list[str]:
        """Return the Flax tensors whose bytes are no longer those of the conversion, or that are gone."""
        return [
            record.flax.name
            for record in self.moved
            if record.flax.name not in flax or Form.of(record.flax.name, flax[record.flax.name]) != record.flax
        ]


def manifest_path(path: Path) -> Path:
    """Return the path of the manifest of a checkpoint.

    >>> manifest_path(Path("model.safetensors")).name
    'model.safetensors.manifest.json'
    """
    return path.with_name(f"{path.name}.manifest.json")


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(octets(array)).hexdigest()
