"""A whole run as plain data: what ``sparsify`` does, and what is written beside its result to repeat it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml

from sparseforge_fx.data.opening import LENGTH
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.catalog import configure, find_beside, find_name, find_options, find_preset
from sparseforge_fx.methods.config import Beside, MethodConfig
from sparseforge_fx.pattern import AnyPattern
from sparseforge_fx.plans import Plan
from sparseforge_fx.ranges import AtLeastZero, Count, CountFromZero, Positive, Seed, check_numbers
from sparseforge_fx.training.distillation import Distillation, check_objective
from sparseforge_fx.training.optimizer import Optimizer, check_method, check_optimizer
from sparseforge_fx.training.settings import Settings, choose_settings

FILE = "recipe.yaml"  # in every output folder
STEPS = 60  # of a run whose length nobody gives
_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 5e-4, which YAML takes for text
_BASE_60 = re.compile(r"[+-]?[\d_]+(:[\d_.]+)+$")  # 2:4, which YAML takes for 124


@dataclass(frozen=True)
class Recipe:
    """How a model is made sparse, in plain values; :meth:`read` and :meth:`write` it as YAML.

    Attributes:
        model, data: what the command line loads: a folder, hub id or file. :func:`sparseforge_fx.sparsify` takes its
            own model, and ``data`` where it is given none.
        teacher: the same model as it was before it was pruned (a folder, hub id or file), where ``model`` is N:M
            already; None: ``model`` as it is teaches what it becomes.
        text_column, separator: of text: the column of its rows (default: the one that stands out, or chats, which go
            through the tokenizer's chat template), what stands between documents (default: the tokenizer's end of
            sequence).
        dtype: that the command line computes in; default the checkpoint's, or float32 on a CPU where that is faster.
        method: trained with distillation: ``sparseforge`` (the default with data), ``gmp``, ``imp``, ``sr-ste``,
            ``ast``, ``cast``, ``maskllm``, ``maskpro``; layer by layer without training: ``alps``, ``sparsegpt``,
            ``wanda``; without data: ``magnitude``. Or a config, which then holds pattern and steps, too.
        preset: of sparseforge: ``alps+kd`` (the default: the layer-wise ALPS solution, fixed masks, distillation),
            ``paper`` or ``paper-universal`` (the scripts of arXiv 2605.06402's authors), or ``annealed`` (their method
            with our constants). What a preset's authors set beside the method (loss, weight decay, SLoRB) goes for the
            fields here that are None, and the report says which.
        options: single fields of the method's config.
        pattern: ``"2:4"`` (the default), any N:M, or ``"50%"`` for zeros without a structure.
        include, exclude: globs over weight or module names.
        plan: which weights become sparse, in the place of include and exclude: a :class:`Plan`, the path of one, or
            formats by the weights' names.
        steps, tokens: length of the run; one of them (default: 60 steps). A step takes ``batch_size`` sequences of
            ``length`` tokens, or one batch of the data, times ``accumulate`` and the number of processes. ``tokens``
            (also ``"20M"``) is the budget of the whole run, in real tokens (padding does not count; samples where
            there are no tokens), over all micro-batches and processes: the run takes as many steps as fit into it.
        lr: peak learning rate. 5e-4 was best for SmolLM2-135M in runs of 60 steps of 2,048 tokens, and level with
            2.5e-4 behind blocks that learned (``reconstruct``); in steps of 512 tokens 1.25e-4 was better there than
            2.5e-4, and that than 5e-4. The authors take 1e-4 for 7B and 20,000 steps.
        objective: what is minimised; None: the preset's, or cross-entropy and KL, each with the weight 1.
        weight_decay: AdamW's, of matrices; None: the preset's, or 0.
        optimizer: ``adamw``, or ``adamw8bit``: AdamW with its moments in 8 bits (torchao), which saves 6 bytes for each
            weight that trains.
        slorb_block: width of the blocks of a SLoRB branch, 0 for none; None: the preset's, or none. It starts with what
            the masks take away, S = mean over each block of W (1 - m) (AST's eq. 6): at once where masks are hard from
            the start, in parts where they harden by and by; at zero after ``sparsegpt`` or ``alps``, whose survivors
            took it over.
        calibration: sequences (of the training data) that a layer-wise start or method sees.
        seed: of data order and sampling, and of the masks of a method that draws them.
    """

    model: str | None = None
    data: str | None = None
    teacher: str | None = None
    text_column: str | None = None
    separator: str | None = None
    dtype: str | None = None
    method: str | MethodConfig | None = None
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: str | AnyPattern | None = None
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    plan: str | Plan | Mapping[str, str] | None = None
    steps: Count | None = None
    tokens: Count | None = None
    batch_size: Count = 4
    length: Count = LENGTH
    accumulate: Count = 1
    lr: Positive = 5e-4
    objective: Distillation | None = None
    weight_decay: AtLeastZero | None = None
    optimizer: Optimizer = "adamw"
    slorb_block: CountFromZero | None = None
    calibration: Count = 64
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            object.__setattr__(self, name, (globs,) if isinstance(globs, str) else tuple(globs))
        if isinstance(self.plan, Path):
            object.__setattr__(self, "plan", str(self.plan))
        if isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", parse_tokens(self.tokens))
        check_numbers(get_type_hints(type(self), include_extras=True), vars(self))
        if self.objective is not None:
            check_objective(self.objective)
        check_optimizer(self.optimizer)
        if self.steps is not None and self.tokens is not None:
            raise SparseForgeError(
                f"steps={self.steps} and tokens={self.tokens} both set the length of the run: give one of them"
            )
        if self.plan is not None and (self.include or self.exclude):
            raise SparseForgeError("a plan says which weights become sparse: leave out include and exclude")

    @staticmethod
    def of(recipe: Recipe | None) -> Recipe:
        """The recipe given, or the default one. Raises SparseForgeError for anything else."""
        if recipe is not None and not isinstance(recipe, Recipe):
            raise SparseForgeError(f"recipe is {recipe!r}: give a Recipe, or Recipe.read(path)")
        return recipe or Recipe()

    def changed(self, **changes: Any) -> Recipe:
        """With other fields; names that are none are options of the method.

        Another method begins without preset and options, which are the former one's; of ``steps`` and ``tokens`` the
        one that is given replaces the other.
        """
        known = {f.name for f in fields(self)}
        own = {name: value for name, value in changes.items() if name in known}
        options = {name: value for name, value in changes.items() if name not in known}
        dropped: dict[str, Any] = {}
        if "method" in own and self.method is not None and own["method"] != self.method:
            dropped = {"preset": None, "options": {}}
        for length, other in (("steps", "tokens"), ("tokens", "steps")):
            if own.get(length) is not None:
                dropped[other] = None
        if options:
            own["options"] = {**dropped.get("options", self.options), **own.get("options", {}), **options}
        return replace(self, **(dropped | own))

    def check_one_step(self) -> None:
        """Of text: raise a SparseForgeError unless the tokens of the run are enough for one step."""
        step = self.batch_size * self.length * self.accumulate
        if self.tokens is not None and self.tokens < step:
            raise SparseForgeError(
                f"tokens {self.tokens} are less than one step of {step}: raise them, or lower batch_size or length"
            )

    def config(self, has_data: bool, steps: int | None = None) -> MethodConfig:
        """The method's constants, over so many steps where it trains (default: the recipe's, else 60).

        Raises SparseForgeError for what the method has not, and for a method that needs data where there is none.
        """
        name = self.name(has_data)
        if isinstance(self.method, MethodConfig):
            config = self._given(self.method)
        else:
            length = {} if find_preset(name, self.preset) is None else {"steps": steps or self.steps or STEPS}
            pattern = "2:4" if self.pattern is None else self.pattern
            drawn: dict[str, Any] = {"seed": self.seed} if "seed" in find_options(name) else {}
            config = configure(name, **length, preset=self.preset, pattern=pattern, **{**drawn, **self.options})
        if not has_data and name != "magnitude":
            raise SparseForgeError(
                f"method {name} needs data: pass text, tokens or batches, or data='self' for a language model"
            )
        if self.slorb_block and not isinstance(config, TrainedConfig):
            raise SparseForgeError(
                f"slorb_block: method {name} trains no low-rank branch: take a trained one, e.g. ast"
            )
        if isinstance(config, TrainedConfig):
            check_method(self.optimizer, config, name)
        return config

    def settings(self, has_data: bool) -> Settings:
        """What the run takes beside the method's constants."""
        given = isinstance(self.method, MethodConfig)
        beside = Beside() if given else find_beside(self.name(has_data), self.preset)
        return choose_settings(beside, self.objective, self.weight_decay, self.slorb_block)

    def name(self, has_data: bool) -> str:
        """The method's, as users type it."""
        if isinstance(self.method, MethodConfig):
            return find_name(self.method)
        return self.method or ("sparseforge" if has_data else "magnitude")

    def _given(self, config: MethodConfig) -> MethodConfig:
        holds = ["preset", "options", "pattern", "steps", "tokens"]
        beside = [name for name in holds if getattr(self, name) not in (None, {})]
        if beside:
            raise SparseForgeError(
                f"method is a {type(config).__name__}, which says all of its own: leave out {', '.join(beside)}"
            )
        return config

    def resolved(self, has_data: bool) -> Recipe:
        """With what was left to defaults that depend on the data or on the method."""
        if isinstance(self.method, MethodConfig):
            return self
        name = self.name(has_data)
        preset = find_preset(name, self.preset)
        length = STEPS if preset is not None and self.tokens is None else None
        return replace(self, method=name, preset=preset, steps=self.steps or length)

    # -- as plain data -----------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """As plain values, which :meth:`from_plain` takes."""
        recipe = self
        if isinstance(self.method, MethodConfig):
            values = {f.name: getattr(self.method, f.name) for f in fields(self.method)}
            recipe = replace(
                self,
                method=find_name(self.method),
                pattern=values.pop("pattern"),
                steps=values.pop("steps", None),
                options=values,
            )
        plain = asdict(replace(recipe, pattern=None, plan=None))
        plain["plan"] = {n: str(f) for n, f in self.plan.formats.items()} if isinstance(self.plan, Plan) else self.plan
        plain["pattern"] = None if recipe.pattern is None else str(recipe.pattern)
        plain["include"], plain["exclude"] = list(recipe.include), list(recipe.exclude)
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> Recipe:
        """Raises SparseForgeError for anything that :meth:`describe` cannot give, with the name of the entry."""
        if not isinstance(plain, Mapping):
            raise SparseForgeError("a recipe is a mapping of names to values: see the one in any output folder")
        values = dict(_numbers(plain))
        hints = get_type_hints(cls)
        if unknown := sorted(set(map(str, values)) - set(hints)):
            raise SparseForgeError(f"a recipe has no entry {', '.join(unknown)}; it has {', '.join(hints)}")
        objective = values.pop("objective", None)
        names = {f.name for f in fields(Distillation)}
        if objective is not None and not (isinstance(objective, Mapping) and set(objective) <= names):
            raise SparseForgeError(f"objective of a recipe takes {', '.join(sorted(names))}, not {objective!r}")
        for name in ("include", "exclude", "options"):
            empty: Any = {} if name == "options" else []
            values[name] = values.get(name) or empty
            glob = isinstance(values[name], str) and name != "options"
            if not glob and not isinstance(values[name], type(empty)):
                raise SparseForgeError(f"{name} of a recipe is {values[name]!r}: give a {type(empty).__name__}")
        if strange := [key for key in values["options"] if not isinstance(key, str)]:
            raise SparseForgeError(f"options of a recipe are named by text, not {strange[0]!r}")
        if not isinstance(plan := values.get("plan"), str | Mapping | None):
            raise SparseForgeError(f"plan of a recipe is {plan!r}: give the path of a plan, or formats by weight")
        for name in ("model", "data", "text_column", "separator", "dtype", "method", "preset", "pattern"):
            if not isinstance(values.get(name), str | None):
                raise SparseForgeError(f"{name} of a recipe is {values[name]!r}: give text")
        return cls(**values, objective=None if objective is None else Distillation(**objective))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """From a YAML file. Raises SparseForgeError where there is none, or where it is no recipe."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise SparseForgeError(f"there is no recipe {path}: name a YAML file, or {FILE} of an output folder")
        try:
            return cls.from_plain(yaml.load(path.read_text(encoding="utf-8"), _Loader))
        except (yaml.YAMLError, UnicodeDecodeError, SparseForgeError) as error:
            raise SparseForgeError(f"{path}: {one_line(error)}") from error

    def to_yaml(self) -> str:
        """As the text of a file; what is not set is left out."""
        plain = {k: v for k, v in self.describe().items() if v not in (None, [], {})}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Without numbers to the base 60, as in YAML 1.2, and with names that come once in a mapping."""

    yaml_implicit_resolvers: ClassVar = {
        first: [("tag:yaml.org,2002:str", _BASE_60), *known]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise SparseForgeError(f"line {key.start_mark.line + 1} gives {key.value} a second time: leave one")
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def _numbers(value: Any) -> Any:
    """Text that is a number in YAML 1.2, as a number."""
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in value.items()}
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def parse_tokens(text: str) -> int:
    """``20M`` -> 20000000; k, M and B (or G), any case. Raises SparseForgeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbg]?)", text.strip(), re.IGNORECASE)
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    count = round(float(match[1]) * scale[match[2].lower()]) if match else 0
    if count < 1:
        raise SparseForgeError(f"{text!r} is not a number of tokens: write for example 500k, 20M or 1.5B")
    return count
