"""A model whose forward is its soft-masked graph, with the dense teacher and the method that moves the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.data.reading import Reader, Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.compile import compile_repeated_blocks, count_blocks
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.taps import Taps, tap
from sparseforge_fx.methods.base import MethodConfig
from sparseforge_fx.methods.curvature import Curvature, fold_on_backward, hutchinson_diagonal
from sparseforge_fx.methods.layerwise import prune_layer_by_layer, undone_on_error
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.models import low_rank
from sparseforge_fx.models.low_rank import Branch
from sparseforge_fx.passes import LinearSite, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_low_rank import branch_names
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.training import distillation as distill
from sparseforge_fx.training.objective import Answer, Objective
from sparseforge_fx.training.trainer_surface import Embedded, ForwardOfSource, hook_embeddings


class SparseModel(nn.Module):
    """The soft-masked graph of a model, with its teacher and its method.

    ``sparse(**batch)`` returns what the model returns; where the output holds logits it carries ``.loss``: in
    training the task loss plus the distillation from the dense teacher, in eval mode the task loss. After
    ``optimizer.step()`` call ``sparse.step()``; at the end :func:`finalize`. The parameters are the source model's
    own.
    """

    def __init__(
        self,
        program: Exported,
        sites: Sequence[LinearSite],
        config: MethodConfig,
        *,
        w_task: float,
        w_kl: float,
        divergence: str = "kl",
        features: str | None = None,
        w_features: float = 1.0,
        slorb_block: int | None = None,
    ):
        super().__init__()
        self.sites = list(sites)
        self.dense = program
        if slorb_block is not None:
            low_rank.check_sites(program, self.sites)
        self.program, self.pass_records = run_passes(program, train_passes(sites, slorb_block=slorb_block))
        self.features, self.w_features = features, w_features
        self.reader = Reader(program)
        self.objective = Objective(w_task, w_kl, divergence, self.config, self.reader.note)
        self.losses = {"w_task": w_task, "w_kl": w_kl, "divergence": divergence, "features": features}
        self.losses |= {"w_features": w_features}
        weights = self._masked_weights()
        state = self.program.state
        self.branches = [Branch(w, state[s]) for w in weights if (s := branch_names(w.fqn)[1]) in state]
        self.handed_over = False  # the branches hold what the masks took, and train on their own from now on
        with low_rank.handed_over(self.branches, self._hands_over):
            self.method = config.build(weights)
        self.steps_done = 0
        self.last_loss: distill.Loss | None = None
        self._optimized = False
        self.graph = self.program.module()
        # children that must not show in parameters(): probes would reach the user's optimizer, the teacher is frozen
        self._hidden: dict[str, Any] = {"embedded": None, "probe": None, "teacher": None}
        self._copies: list[tuple[Tensor, Tensor]] | None = None
        if w_kl:
            self._hidden["teacher"] = self._freeze_teacher()
        if features is not None:
            self._tap(distill.FEATURES[features])
        self._compiled: dict[str, Any] | None = None
        self._checkpointing = False
        self._embedded: tuple[str, Embedded] | None = None
        self._runners: dict[str, Callable] = {"graph": self.graph}
        self._hooks: list = []
        self._probes: dict[str, Tensor] = {}  # by the weight's name
        self._batches: list[Reading] = []  # this step's micro-batches, where Hutchinson needs them
        self.curvature = self.method.curvature
        self._estimator = None if self.curvature is None else self.curvature.estimator
        if self._estimator in ("gauss_newton", "activation"):
            self._insert_probes()

    # -- construction ------------------------------------------------------------------------------------------------
    def _masked_weights(self) -> list[MaskedWeight]:
        tensor = self.program.tensor
        return [
            MaskedWeight(s.fqn, tensor(s.fqn), tensor(mask_name(s.fqn)), s.reduction_dim) for s in eligible(self.sites)
        ]

    def _insert_probes(self) -> None:
        estimator = self._estimator
        probed, _ = run_passes(self.program, train_passes(self.sites, estimator=estimator))
        module = probed.module()
        if self.features is not None:
            module = tap(module, self._seen[0], attention=distill.FEATURES[self.features])
        found = dict(module.named_parameters())
        self._probes = {w.fqn: found[probe_name(w.fqn)] for w in self.method.weights}
        assert self.curvature is not None
        self._hooks = fold_on_backward(self._probes, self.curvature)
        self._hidden["probe"] = self._runners["probe"] = module

    def _tap(self, attention: bool) -> None:
        """Let student and teacher keep their intermediate values."""
        self._seen = (Taps(), Taps())
        self.graph = tap(self.graph, self._seen[0], attention=attention)
        if self._hidden["teacher"] is None:
            self._hidden["teacher"] = self._freeze_teacher()
        self._hidden["teacher"] = tap(self._hidden["teacher"], self._seen[1], attention=attention)

    def _freeze_teacher(self) -> nn.Module:
        """The dense program over clones of what changes: parameters that require grad, and the sites. The rest is
        shared."""
        frozen = self.dense.copy()
        clones = {id(value): clone for value, clone in self.copies()}
        for fqn, value in list(frozen.state.items()):
            frozen.state[fqn] = clones.get(id(value), value)  # ties stay ties
        return frozen.module()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """The model's tensors that training writes, each with its dense value: the teacher's own, where there is one.
        To be asked for before the first of them changes."""
        if self._copies is None:
            sites = {id(w.weight) for w in self.method.weights}
            written = {id(v): v for v in self.dense.state.values() if isinstance(v, nn.Parameter)}
            self._copies = [
                (value, nn.Parameter(value.detach().clone(), requires_grad=False))
                for value in written.values()
                if value.requires_grad or id(value) in sites
            ]
        return self._copies

    def compile(self, *args: Any, **options: Any) -> None:
        """Run the graph (and its probed twin, and the teacher) under torch.compile, one repeated block compiled
        once."""
        del args
        if self.features is not None:
            raise SparseForgeError("intermediate values cannot be kept under torch.compile: pass compile=False")
        self._compiled = options
        self._make_runners()

    def _make_runners(self) -> None:
        """What runs: the modules, with a hold on the embeddings, with checkpointed or compiled blocks, as was asked."""
        for name in ("graph", "probe", "teacher"):
            module = self.graph if name == "graph" else self._hidden.get(name)
            if module is None:
                continue
            student = name != "teacher"
            if student and self._embedded is not None:
                module = hook_embeddings(module, *self._embedded)
            again = student and self._checkpointing
            if self._compiled is not None:
                module = compile_repeated_blocks(module, checkpoint=again, **self._compiled)
            elif again:
                module = compile_repeated_blocks(module, compile=False, checkpoint=True)
            self._runners[name] = module

    # -- what the Hugging Face Trainer asks of a model ---------------------------------------------------------------
    def activation_checkpointing_enable(
        self, *, every_n_layers: int = 1, offload: bool = False, **options: Any
    ) -> None:
        """Compute every repeated block again in the backward pass instead of keeping its activations.
        Raises SparseForgeError where it cannot."""
        del options  # of torch.utils.checkpoint, for modules
        if every_n_layers != 1 or offload:
            raise SparseForgeError(
                "activations are checkpointed at every block, without offloading: take every_n_layers=1"
            )
        if self.features is not None:
            raise SparseForgeError("features cannot be distilled under activation checkpointing: choose one of the two")
        if not count_blocks(self.graph):
            raise SparseForgeError("the model has no repeated blocks whose activations could be checkpointed")
        self._checkpointing = True
        self._make_runners()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(**options)

    def get_input_embeddings(self) -> nn.Module:
        """A module that hands the embeddings on inside the graph: forward hooks on it change them (NEFTune)."""
        if self._embedded is None:
            source = self.dense.source
            table = source.get_input_embeddings() if hasattr(source, "get_input_embeddings") else None  # type: ignore[union-attr, operator]
            name = next((n for n, m in source.named_modules() if m is table), None) if source is not None else None
            if name is None:
                raise SparseForgeError("the model does not say which module its input embeddings are")
            self._embedded = (name, Embedded(self))
            self._make_runners()
        return self._embedded[1]

    def _get_name(self) -> str:
        """The source's: by it the Trainer's own losses know whether labels are shifted."""
        return type(self).__name__ if self.dense.source is None else self.dense.source._get_name()

    #: the mean over micro-batches is the Trainer's work, not the model's
    accepts_loss_kwargs = False

    @property
    def config(self) -> Any:
        """The source model's config, as the Trainer expects; None without one. The annealing's is ``method.config``."""
        return getattr(self.dense.source, "config", None)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, but a tied tensor comes under its first name only: safetensors refuses shared memory."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self._aliases():
            state.pop(prefix + name, None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What :meth:`state_dict` gave; sets weights and masks. The rest of the annealing is in ``method.state()``."""
        first = {name: state_dict[one] for name, one in self._aliases().items() if one in state_dict}
        return super().load_state_dict({**first, **state_dict}, *args, **kwargs)

    def _aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> the first name."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(p), name) for name, p in self.named_parameters(remove_duplicate=False)}
        return {name: one for name, one in names.items() if name != one}

    def train(self, mode: bool = True) -> SparseModel:
        self.training = mode  # exported graphs refuse .train(): they are traced in eval mode
        return self

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in ("probe", "teacher"):
            if self._hidden.get(name) is not None:
                self._hidden[name]._apply(fn)
        self.method.move(fn)
        masks = dict(self.graph.named_buffers())
        for w in self.method.weights:
            w.mask = masks[mask_name(w.fqn)]
            self.program.state[mask_name(w.fqn)] = w.mask
            if self._hidden["probe"] is not None:
                owner, _, leaf = mask_name(w.fqn).rpartition(".")
                self._hidden["probe"].get_submodule(owner)._buffers[leaf] = w.mask
                probe = self._hidden["probe"].get_parameter(probe_name(w.fqn))
                probe.data = probe.data.new_zeros(()).expand(probe.shape)  # one element again
        return self

    def release(self) -> None:
        """Take the hooks off the model's weights, and let go of the teacher and the probed twin."""
        for hook in (*self._hooks, *self.method.hooks):
            hook.remove()
        self._hidden.update(probe=None, teacher=None)
        self._copies = None
        for name in ("probe", "teacher"):
            self._runners.pop(name, None)
        self._probes.clear()
        self._batches.clear()

    # -- training ----------------------------------------------------------------------------------------------------
    def calibrate(self, batches: Sequence[Any]) -> dict[str, str]:
        """Set weights and masks to the layer-wise solution on ``batches`` that ``config.start`` names."""
        readings = [self.reader.read(*as_call(batch)) for batch in batches]
        weights = self.method.weights
        solve = LAYERWISE[self.method.config.start](self.method.config.pattern)
        with undone_on_error(weights) as dense, low_rank.handed_over(self.branches, self._hands_over):
            notes = prune_layer_by_layer(self.program, weights, readings, solve)
            # survivors that took over what was pruned leave nothing to the branches
            moved = any(bool(((w.weight - dense[w.fqn]) * w.mask).any()) for w in weights)
            self.handed_over = moved and self.method.config.prunes_on_the_way
            self.method.start_from(dense)
        return notes

    @ForwardOfSource
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        kwargs |= {} if labels is None else {"labels": labels}  # a name of its own: the Trainer looks for it
        batch = self.reader.read(args, kwargs)
        learning = self.training and (torch.is_grad_enabled() or not self.method.config.by_gradient)
        probing = learning and self._hidden["probe"] is not None and self.method.wants_curvature(self.steps_done)
        if self.features is not None:
            self._seen[0].clear()
        output = self._runners["probe" if probing else "graph"](*batch.args, **batch.kwargs)
        if learning and self._estimator == "hutchinson" and self.method.wants_curvature(self.steps_done):
            self._batches.append(batch)
        self.last_loss = self.loss(output, batch, teach=learning)
        if self.last_loss is not None and isinstance(output, dict):
            output["loss"] = self.last_loss.total
        return output

    def loss(self, output: Any, batch: Reading, *, teach: bool, twice: bool = False) -> distill.Loss | None:
        """The loss of one output (see :class:`Objective`); ``teach``: with the distance from the teacher; ``twice``: it
        has a second derivative.

        None if neither labels nor a teacher say anything about this output.
        """
        student = self.objective.answer(output)
        teacher = self._teach(batch) if teach and self._hidden["teacher"] is not None else None
        loss = self.objective.loss(student, teacher, batch, task_alone=not teach, twice=twice)
        if loss is not None and teach and self.features is not None:
            distance = distill.feature_loss(self.features, *self._seen, batch.real)
            loss = loss._replace(total=loss.total + self.w_features * distance)
        return loss

    @torch.no_grad()
    def _teach(self, batch: Reading) -> Answer:
        """What the dense model answers."""
        if self.features is not None:
            self._seen[1].clear()
        run = self._runners.get("teacher", self._hidden["teacher"])
        return self.objective.answer(run(*batch.args, **batch.kwargs))

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
        self._optimized = True
        return self.method.optimizer(
            self.trainable() if parameters is None else list(parameters), lr=lr, betas=betas, weight_decay=weight_decay
        )

    def trainable(self) -> list[nn.Parameter]:
        """The model's parameters that the method trains, then the method's own."""
        config = self.method.config
        return [p for p in self.parameters() if p.requires_grad and config.trains_weights] + self.method.parameters()

    def step(self) -> None:
        """Bring the masks to the next step; call it after ``optimizer.step()`` and before ``zero_grad()``."""
        if self.method.config.own_optimizer and not self._optimized:
            raise SparseForgeError(
                f"part of {type(self.method).__name__} is in its optimizer: train with sparse.optimizer(lr=...)"
            )
        if self.curvature is not None and self.method.wants_curvature(self.steps_done):
            self._complete(self.curvature)
        self._batches.clear()
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

    def _complete(self, curvature: Curvature) -> None:
        """Bring in what this step says of the curvature beside what its backward passes have folded."""
        weights = {w.fqn: w.mask for w in self.method.weights}  # of the weight's shape, in the dtype that h is kept in
        if self._estimator == "squared_gradient":
            gradients = {w.fqn: w.weight.grad for w in self.method.weights if w.weight.grad is not None}
            curvature.add_signed(gradients, weights)
        elif self._estimator == "hutchinson":
            vectors = self.method.config.curvature_vectors
            for index in range(vectors):
                curvature.add_signed(self._hutchinson(index), weights, 1 / vectors)
        curvature.close(self._probes or weights)

    def _hutchinson(self, index: int) -> dict[str, Tensor]:
        """v * (H v) of this step's loss, its mean over the micro-batches, at the effective weights W * e, through the
        dense graph: its ops differentiate twice. v depends on the step and on ``index``, not on process or batch."""
        weights = {w.fqn: (self.program.tensor(w.fqn).detach() * w.mask).requires_grad_() for w in self.method.weights}
        module = self.dense.module()
        total: dict[str, Tensor] = {}
        for batch in self._batches:


            def loss(batch: Reading = batch) -> Tensor:
                output = torch.func.functional_call(module, weights, batch.args, batch.kwargs, tie_weights=True)
                found = self.loss(output, batch, teach=True, twice=True)
                assert found is not None, "a step with gradients has a loss"
                return found.total

            generator = torch.Generator(device=next(iter(weights.values())).device)
            generator.manual_seed(self.steps_done + (index << 32))
            for fqn, part in hutchinson_diagonal(loss, weights, generator=generator).items():
                part /= len(self._batches)
                total[fqn] = total[fqn].add_(part) if fqn in total else part
        return total
