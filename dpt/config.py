"""Configuration: dataclasses are the schema, a YAML holds the differences, `key=value` overrides on the command line.

OmegaConf checks names and types; it never leaves this module.
"""

import difflib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def load_config(schema: type[T], path: str | Path | None = None, overrides: list[str] = ()) -> T:
    """An instance of the dataclass `schema`: its defaults, then the YAML at `path`, then `overrides` ("a.b=1").

    Raises:
        ValueError: an unknown key (with a suggestion), a wrong type, or an override that is not `key=value`.
    """
    config = OmegaConf.structured(schema)
    sources = []
    if path is not None:
        try:
            sources.append((str(path), OmegaConf.load(path)))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
        sources.append((override, OmegaConf.from_dotlist([override])))
    for name, source in sources:
        try:
            config = OmegaConf.merge(config, source)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or ""
            known = _keys(schema)
            if key and key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"
                raise ValueError(f"{name}: unknown key {key}{hint}") from error
            raise ValueError(f"{name}: {key}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(config)


def _keys(schema, prefix="") -> list[str]:
    keys = []
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys


def save_config(config, path: str | Path) -> None:
    """Writes a config dataclass, every value included, as YAML."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False))
