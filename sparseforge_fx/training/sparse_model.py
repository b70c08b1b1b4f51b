"""A model whose forward is its soft-masked graph, with the dense teacher and the method that moves the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparseforge_fx.data.reading import Reader, Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.compile import compile_repeated_blocks
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.module_tree import shared_blocks
from sparseforge_fx.graph.program import Program
from sparseforge_fx.graph.taps import Taps, tap
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.curvature import PROBES
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.methods.finish import finish
from sparseforge_fx.methods.layerwise import prune_layer_by_layer, undone_on_error
from sparseforge_fx.methods.on_grid import OnGrid, fitting
from sparseforge_fx.methods.one_shot import LAYERWISE, magnitude, tell_new
from sparseforge_fx.methods.reorder import Reordering
from sparseforge_fx.methods.rounding import format_of
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import LinearSite, harden_passes, run_passes, step_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_low_rank import branch_names
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.training import low_rank
from sparseforge_fx.training.curvature_probe import CurvatureProbe
from sparseforge_fx.training.distillation import FEATURES, Distillation, Loss, feature_loss
from sparseforge_fx.training.low_rank import Branch
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.sharded import ESTIMATOR, ShardedProbe, Sharding, Shards, mask_of_ones
from sparseforge_fx.training.teacher import Teacher, counterparts, dense_copies
from sparseforge_fx.training.trainer_surface import Embedded, ForwardOfSource, TrainerSurface, hook_embeddings


class SparseModel(TrainerSurface):
    """The soft-masked graph of a model, with its teacher and its method; its parameters are the source model's own.

    ``sparse(**batch)`` returns what the model returns; where the output holds logits it carries ``.loss``: in
    training the task loss plus the distillation from the dense teacher, in eval mode the task loss. After
    ``optimizer.step()`` call ``sparse.step()``; at the end :func:`finalize`.
    """

    def __init__(
        self,
        program: Exported,
        sites: Sequence[LinearSite],
        config: TrainedConfig,
        distillation: Distillation | None = None,
        *,
        slorb_block: int | None = None,
        set_back: Callable[[], None] | None = None,
        sharding: Sharding | None = None,
        taught_by: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.sites = list(sites)
        self.dense = program
        self.distillation = distillation or Distillation()
        self._set_back = set_back  # what the parameters' flags were, for :meth:`release`
        self._taught_by = taught_by  # the teacher's weights, by the names of the model's
        if slorb_block is not None:
            low_rank.check_sites(program, self.sites)
        make = torch.ones_like if sharding is None else mask_of_ones
        passes = partial(train_passes, self.sites, slorb_block=slorb_block, mask=make)
        self.program, self.pass_records = run_passes(program, passes())
        self.reader = Reader(program)
        self.objective = Objective(self.distillation, self.config, self.reader.note)
        tensor, state = self.program.tensor, self.program.state
        self.shards: Shards | None = None
        if sharding is not None:
            probing = passes(estimator=ESTIMATOR, counted=True)
            self.shards = Shards(sharding, self.program, probing, self.sites, config.pattern)  # type: ignore[arg-type]
        whole = (
            MaskedWeight(s.fqn, tensor(s.fqn), tensor(mask_name(s.fqn)), s.reduction_dim) for s in eligible(self.sites)
        )
        weights = list(whole) if self.shards is None else self.shards.weights
        self.branches = [Branch(w, state[s]) for w in weights if (s := branch_names(w.fqn)[1]) in state]
        self.handed_over = False  # the branches hold what the masks took, and train on their own from now on
        with low_rank.handed_over(self.branches, self._hands_over):
            self.method = config.build(weights)
        formats, self._off_grid = fitting(weights, format_of(config.values), config.pattern)
        self.on_grid = OnGrid(weights, formats) if formats else None
        self.start_report: dict[str, Any] = {}  # of a layer-wise start; saved with the run
        self.moves: Reordering | None = None  # what it put in another order; not saved
        self.steps_done = 0
        self.last_loss: Loss | None = None
        self.optimized = False
        features = self.distillation.features
        self.seen = Taps()
        self.graph = self._module(self.program) if self.shards is None else self.shards.module
        self._copies: list[tuple[Tensor, Tensor]] | None = None
        self.teacher: Teacher | None = None
        if self.distillation.kl or features is not None:
            cut = None if self.shards is None else self.shards.teacher
            self.teacher = Teacher(program, self._teachers(), features, cut)
            self._taught_by = None  # processes that share the teacher have parts of it alone
        self.probe: CurvatureProbe | ShardedProbe | None = None
        if self.shards is not None:
            self.shards.empty(program)
            if self.method.curvature is not None:
                self.probe = ShardedProbe(self.shards, self.method.curvature)
        elif (curvature := self.method.curvature) is not None and curvature.estimator is not None:
            probing = passes(estimator=PROBES.get(curvature.estimator), counted=True)
            self.probe = CurvatureProbe(
                program, self.program, probing, weights, curvature, self.objective.answer, self._tapped, seed
            )
        self.compiled: dict[str, Any] | None = None
        self.checkpointing = False
        self.embedded: tuple[str, Embedded] | None = None
        self._settled: GraphModule | None = None  # the graph without masks, over weights that hold them
        self._run: dict[str, Callable[..., Any]] = {"graph": self.graph}  # not a child of its own

    # -- construction ------------------------------------------------------------------------------------------------
    def _module(self, program: Program) -> GraphModule:
        """What a step runs of a program; features are looked for in it as it was captured."""
        untouched = self.distillation.features is not None
        return self.as_norms(self._tapped((program if untouched else run_passes(program, step_passes())[0]).module()))

    def _tapped(self, module: GraphModule) -> GraphModule:
        """Let a student's module keep its intermediate values, where they are distilled."""
        features = self.distillation.features
        return module if features is None else tap(module, self.seen, attention=FEATURES[features])

    def _teachers(self) -> list[tuple[Tensor, Tensor]]:
        """The model's tensors, each with the one that the teacher has in its place."""
        return self.copies() if self._taught_by is None else counterparts(self.dense, self._taught_by)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """The model's tensors that training writes, each with its value now: the teacher's own, where there is one and
        no other model is it. To be asked for before the first of them changes."""
        if self.shards is not None:  # which have parts of their own
            everything = {id(v): v for v in self.dense.state.values() if isinstance(v, nn.Parameter)}
            return [(v, nn.Parameter(v.detach(), requires_grad=False)) for v in everything.values()]
        if self._copies is None:
            self._copies = dense_copies(self.dense, [w.weight for w in self.method.weights])
        return self._copies

    def compile(self, *args: Any, **options: Any) -> None:
        """Run the graph (and its probed twin, the teacher, and the loss of scores) under torch.compile, one repeated
        block compiled once."""
        del args
        if why := self.not_compiled():
            raise SparseForgeError(f"{why}: pass compile=False")
        self.compiled = options
        self.objective.compile(**options)
        self.make_runners()

    def not_compiled(self) -> str | None:
        """Why this model is not compiled; None: it can be."""
        if self.distillation.features is not None:
            return "intermediate values cannot be kept under torch.compile"
        if self.shards is not None and not shared_blocks(self.graph):
            return "a model that processes share is compiled by its repeated blocks, and this one has none"
        return None

    def make_runners(self) -> None:
        """What runs: the modules, with a hold on the embeddings, with checkpointed or compiled blocks, as was asked."""
        self._run["graph"] = self._runner(self.graph if self._settled is None else self._settled)
        if self.probe is not None and self.probe.module is not None:
            self.probe.run = self._runner(self.probe.module)
        if self.teacher is not None:
            self.teacher.run = self._runner(self.teacher.module, student=False)

    def _runner(self, module: GraphModule, student: bool = True) -> GraphModule:
        if student and self.embedded is not None:
            module = hook_embeddings(module, *self.embedded)
        again = student and self.checkpointing
        if self.shards is not None:
            for block in shared_blocks(module):
                block.run_as(self.compiled, again)
            return module
        if self.compiled is not None:
            return compile_repeated_blocks(module, checkpoint=again, **self.compiled)
        return compile_repeated_blocks(module, compile=False, checkpoint=True) if again else module

    def train(self, mode: bool = True) -> SparseModel:
        self.training = mode  # exported graphs refuse .train(): they are traced in eval mode
        return self

    def _apply(self, fn, recurse=True):
        if self.shards is not None:
            raise SparseForgeError("a model that processes share stays where it is: move it before it is prepared")
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher.module._apply(fn)
        self.method.move(fn)
        masks = dict(self.graph.named_buffers())
        for w in self.method.weights:
            w.mask = masks[mask_name(w.fqn)]
            self.program.state[mask_name(w.fqn)] = w.mask
        if isinstance(self.probe, CurvatureProbe):
            self.probe.move(fn)
        return self

    def release(self) -> None:
        """Take the hooks off the weights, give parameters their flags back, let go of teacher and probed twin."""
        for hook in self.method.hooks:
            hook.remove()
        if self.probe is not None:
            self.probe.release()
        if self._set_back is not None:
            self._set_back()
        self.probe = self.teacher = self._copies = self._set_back = self.shards = None

    # -- training ----------------------------------------------------------------------------------------------------
    def settle(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Where masks are final and a process has the whole model: multiply the weights by them, once, and run the
        plain graph. Returns weights and masks: whoever writes a weight multiplies it. Empty where nothing changes."""
        if not self.method.fixed or self.shards is not None:
            return []
        self._settled = self._module(run_passes(self.program, harden_passes(self.method.pattern))[0])
        self.make_runners()
        return [(self.program.tensor(w.fqn), w.mask) for w in self.method.weights]

    def calibrate(self, batches: Sequence[Any]) -> dict[str, str]:
        """Set weights and masks to what ``config.start`` names: a layer-wise solution on ``batches``, or magnitude."""
        readings = [self.reader.read(*as_call(batch)) for batch in batches]
        weights = self.method.weights
        config = self.method.config
        start = LAYERWISE[config.start](config.pattern) if config.start in LAYERWISE else None
        experts = Experts(config.pattern, config.expert_tokens, config.every_token)
        vectors = [p for p in self.parameters() if p.dim() < 2] if config.reorder or config.reconstruct else []
        teacher = (self.teacher or Teacher(self.dense, self._teachers())) if config.reconstruct else None
        with undone_on_error(weights, vectors) as dense, low_rank.handed_over(self.branches, self._hands_over):
            if config.reorder:
                self.moves = Reordering(self.program, config.pattern, weights)
            if start is None:
                notes = tell_new(weights, config.pattern)
                magnitude(weights, config.pattern)
            else:
                notes = prune_layer_by_layer(self.program, weights, readings, start.solve, experts, self.moves)
            # survivors that took over what was pruned leave nothing to the branches
            moved = any(bool(((w.weight - dense[w.fqn]) * w.mask).any()) for w in weights)
            self.handed_over = (moved or teacher is not None) and config.prunes_on_the_way
            how = {"epochs": config.reconstruct, "lr": config.reconstruct_lr}
            aim = None if teacher is None else teacher.module
            blocks, told, more = finish(self.program, weights, readings, self.on_grid, aim, **how)
            self.reader.notes += more
            for fqn, text in (told | self._off_grid).items():
                notes[fqn] = "; ".join(filter(None, (notes.get(fqn), text)))
            self.method.start_from(dense)
        self.start_report = {"layer_notes": notes, **experts.describe(), **blocks}
        return notes

    @ForwardOfSource
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        kwargs |= {} if labels is None else {"labels": labels}  # a name of its own: the Trainer looks for it
        batch = self.reader.read(args, kwargs)
        learning = self.training and (torch.is_grad_enabled() or not self.method.config.by_gradient)
        probe = self.probe if learning and self.method.wants_curvature(self.steps_done) else None
        self.seen.clear()
        if probe is not None:
            probe.keep(batch)
        run = probe.run if probe is not None and probe.rides else None
        run = run or self._run["graph"]
        output = run(*batch.args, **batch.kwargs)
        self.last_loss = self.loss(output, batch, teach=learning)
        if self.last_loss is not None and isinstance(output, dict):
            output["loss"] = self.last_loss.total
        return output

    def loss(self, output: Any, batch: Reading, *, teach: bool, twice: bool = False) -> Loss | None:
        """The loss of one output (see :class:`Objective`); ``teach``: with the distance from the teacher; ``twice``: it
        has a second derivative.

        None if neither labels nor a teacher say anything about this output.
        """
        student = self.objective.answer(output)
        taught = None if self.teacher is None or not teach else self.teacher(batch)
        teacher = None if taught is None else self.objective.answer(taught)
        loss = self.objective.loss(student, teacher, batch, task_alone=not teach, twice=twice)
        features = self.distillation.features
        if loss is not None and teacher is not None and features is not None:
            assert self.teacher is not None
            distance = feature_loss(features, self.seen, self.teacher.seen, batch.real)
            loss = loss._replace(total=loss.total + self.distillation.feature_weight * distance)
        return loss

    def optimizer(
        self,
        parameters: Sequence[nn.Parameter] | None = None,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        """The method's optimizer: AdamW, with the decay or the parameters that the method adds to it.

        ``parameters``: default, everything that the method trains. With ``ast``, ``sr-ste``, ``cast`` and ``maskllm``
        no other optimizer will do.
        """
        self.optimized = True
        return self.method.optimizer(
            self.trainable() if parameters is None else list(parameters), lr=lr, betas=betas, weight_decay=weight_decay
        )

    def trainable(self) -> list[nn.Parameter]:
        """The model's parameters that the method trains, then the method's own."""
        config = self.method.config
        parameters = self.parameters() if self.shards is None else self.shards.parameters.values()
        return [p for p in parameters if p.requires_grad and config.trains_weights] + self.method.parameters()

    def step(self) -> None:
        """Bring the masks to the next step; call it after ``optimizer.step()`` and before ``zero_grad()``."""
        if self.method.config.own_optimizer and not self.optimized:
            raise SparseForgeError(
                f"part of {type(self.method).__name__} is in its optimizer: train with sparse.optimizer(lr=...)"
            )
        if self.probe is not None:
            if self.method.wants_curvature(self.steps_done):
                self.probe.complete(self.steps_done, self._loss_again)
            self.probe.forget()
        with low_rank.handed_over(() if self.handed_over else self.branches, self._hands_over):
            self.method.after_step(self.steps_done)
        self.steps_done += 1

    def fix(self) -> None:
        """Make the masks hard, for good."""
        with low_rank.handed_over(() if self.handed_over else self.branches, self._hands_over):
            self.method.fix()

    def _hands_over(self) -> bool:
        """Has the method just taken something from the weights that the branches are to carry?"""
        if self.handed_over:
            return False
        method = self.method
        on_the_way = method.config.prunes_on_the_way
        hard = all(check_pattern(w.mask, method.pattern, w.dim) for w in method.weights)
        self.handed_over = method.fixed or (on_the_way and hard)
        return self.handed_over or on_the_way

    def _loss_again(self, output: Any, batch: Reading) -> Tensor:
        found = self.loss(output, batch, teach=True, twice=True)
        assert found is not None, "a step with gradients has a loss"
        return found.total
