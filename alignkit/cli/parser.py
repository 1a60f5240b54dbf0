"""`RecipeParser`: the options of a recipe from its own defaults, a YAML file and the command line, in that order."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from alignkit.cli.coerce import Mismatch, coerce, members, takes_list
from alignkit.errors import AlignkitError, ConfigError, nearest

USAGE_ERROR = 2  # exit code, as argparse's
NO_EFFECT_IN_RECIPES = ("do_train", "do_eval", "do_predict")
SPELLINGS = {  # older name: newer name
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class Option(NamedTuple):
    """One field of one of the dataclasses."""

    hint: Any  # its type
    choices: tuple[str, ...]  # empty if anything of that type will do


class _Unset:
    """Marks an argument that the command line did not give, so that a file's value is not covered by a default."""


class _Gather(argparse.Action):
    """Stores a value as argparse does, but gathers those of a list that is given several times."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        given = vars(namespace)[self.dest]
        is_list = isinstance(values, list) and isinstance(given, list)
        vars(namespace)[self.dest] = [*given, *values] if is_list else values


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print alignkit's errors on stderr without a traceback, exit code 2, for use around a script's main function."""
    try:
        yield
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(USAGE_ERROR)


class RecipeParser(HfArgumentParser):
    """Fill dataclasses from a recipe's defaults, `--config file.yaml`, and arguments; the later wins.

    Every key must be a field of one of the dataclasses, and every value must have its type. Nothing else is read: no
    environment, no `.args` file, no abbreviated options.

    Args:
        dataclass_types: the classes to fill, without two fields of the same name.
    """

    def __init__(self, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        kwargs.setdefault("usage", "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]")
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="Options as a YAML mapping; arguments go over it.")
        self.options = {
            field.name: Option(hints[field.name], tuple(field.metadata.get("choices", ())))
            for dataclass_type in self.dataclass_types
            for hints in (get_type_hints(dataclass_type),)
            for field in dataclasses.fields(dataclass_type)
            if field.init
        }
        for action in self._actions:
            if action.dest in self.options and action.nargs != 0:
                self._leave_conversion_to_us(action)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an option that gathers what it is given."""
        return super().add_argument(*names, **{"action": _Gather, **settings})

    def _leave_conversion_to_us(self, action: argparse.Action) -> None:
        """Take text from argparse, so that a file and a command line are read by the same rules."""
        hint = self.options[action.dest].hint
        action.type = None
        if takes_list(hint):
            action.nargs = "+"
        elif bool in members(hint):
            action.nargs, action.const = "?", True  # `--flag` alone means true

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, so that a caller sees one kind of error."""
        raise ConfigError(message)

    def parse(self, argv: Sequence[str] | None = None, *, defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Return one instance of each dataclass.

        Args:
            argv: arguments without the program's name. None reads `sys.argv`, and then an error ends the program with
                its message on stderr and exit code 2.
            defaults: values that the recipe puts in place of the dataclasses' own.

        Raises:
            ConfigError: for a key that no dataclass has, a value of the wrong type, a file that cannot be read, or
                whatever a dataclass refuses.
        """
        if argv is None:
            with plain_errors():
                return self._parse(sys.argv[1:], defaults or {})
        return self._parse(argv, defaults or {})

    def _parse(self, argv: Sequence[str], defaults: Mapping[str, Any]) -> tuple[Any, ...]:
        arguments = self._read_arguments(argv)
        config_path = arguments.pop("config", None)
        values = self._checked(dict(defaults), dict.fromkeys(defaults, "the recipe's defaults"))
        if config_path is not None:
            values |= self._checked(*read_yaml(Path(config_path)))
        values |= self._checked(arguments, {name: f"--{name}" for name in arguments})
        return tuple(self._build(dataclass_type, values) for dataclass_type in self.dataclass_types)

    def _read_arguments(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return only what the command line says itself."""
        namespace = argparse.Namespace(**{action.dest: _Unset for action in self._actions})
        namespace, unknown = self.parse_known_args(list(argv), namespace)
        flags = [text.split("=")[0] for text in unknown if text.startswith("--")]
        if flags:
            name = flags[0].lstrip("-").replace("-", "_")
            raise ConfigError(f"unknown option {flags[0]}.{nearest(name, [*self.options, 'config'])}")
        if unknown:
            raise ConfigError(f"unexpected argument {unknown[0]!r}; options are written --name value.")
        return {name: value for name, value in vars(namespace).items() if value is not _Unset}

    def _checked(self, values: dict[str, Any], places: Mapping[Any, str]) -> dict[str, Any]:
        """Return one source's values with their fields' types, older spellings replaced by newer ones."""
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in self.options:
                raise ConfigError(f"{places[name]}: unknown option {name!r}.{nearest(str(name), self.options)}")
            if name in NO_EFFECT_IN_RECIPES:
                raise ConfigError(
                    f"{places[name]}: {name} has no effect; a recipe always trains, and evaluates if `eval_strategy` "
                    "says so."
                )
            checked[name] = self._typed(name, value, places[name])
        for old, new in SPELLINGS.items():
            if old in checked and new in self.options:
                value = checked.pop(old)
                if checked.setdefault(new, value) != value:
                    raise ConfigError(f"{places[old]}: {old} and {new} are two names of one option; give one of them.")
        return checked

    def _typed(self, name: str, value: Any, place: str) -> Any:
        option = self.options[name]
        if isinstance(value, list) and len(value) == 1 and str in members(option.hint):
            value = value[0]  # `--report_to tensorboard` is one text, not a list of one
        try:
            typed = coerce(value, option.hint)
        except Mismatch as mismatch:
            raise ConfigError(f"{place}: {name}={value!r} is not {mismatch.expected}.") from None
        if option.choices and typed is not None and typed not in option.choices:
            hint = nearest(str(typed), option.choices)
            raise ConfigError(f"{place}: {name}={typed!r} is not one of {', '.join(option.choices)}.{hint}")
        return typed

    def _build(self, dataclass_type: type, values: Mapping[str, Any]) -> Any:
        names = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
        try:
            return dataclass_type(**{name: value for name, value in values.items() if name in names})
        except ConfigError:
            raise
        except ValueError as error:  # what TrainingArguments itself refuses
            raise ConfigError(str(error)) from error


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the mapping in a YAML file, and for each key its file and line.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, is not a mapping, or says something twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {str(path)!r} is not UTF-8 text ({error.reason}).") from None
    except OSError as error:
        raise ConfigError(f"--config: {str(path)!r} cannot be read ({error.strerror}).") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path} line {line}: not valid YAML ({error.problem}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}).") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep to be read; options are flat.") from None
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else f"a {root.id}"
        raise ConfigError(f"{path}: must hold a mapping (option: value), found {found}.")
    places: dict[str, str] = {}
    for key, _ in root.value:
        place = f"{path} line {key.start_mark.line + 1}"
        if key.value in places:
            raise ConfigError(f"{place}: {key.value} is given twice.")
        places[key.value] = place
    return values, {name: places.get(str(name), str(path)) for name in values}
