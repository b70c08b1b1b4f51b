"""``sparsify``: the whole job in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparseforge_fx.data.batches import Batches, as_batches, count_rows, count_steps, is_text
from sparseforge_fx.data.chats import leading_bos
from sparseforge_fx.data.reading import Reader, Reading
from sparseforge_fx.data.text import unused_text
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.adapters import adapter_notes, find_adapters
from sparseforge_fx.graph.capture import as_call, capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.methods.base import MethodConfig
from sparseforge_fx.methods.catalog import find_method, find_options
from sparseforge_fx.methods.layerwise import Solve, prune_layer_by_layer, undone_on_error
from sparseforge_fx.methods.one_shot import LAYERWISE, magnitude
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.models.dense import check_parent
from sparseforge_fx.passes import LinearSite, find_linears, harden_passes, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import AnyPattern, check_pattern, density, parse_pattern
from sparseforge_fx.ranges import AtLeastZero, Count, Positive, checked
from sparseforge_fx.report import describe_sites, environment, peak_memory_bytes
from sparseforge_fx.training import fingerprint, processes
from sparseforge_fx.training.distillation import check_losses
from sparseforge_fx.training.first_batch import check_batch, check_length, example_inputs_of
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.prepare import check_sites, check_weights, finalize
from sparseforge_fx.training.sparse_model import SparseModel
from sparseforge_fx.training.train import train
from sparseforge_fx.training.undo import dense_again_on_error
from sparseforge_fx.training.unused import unused_arguments


@dataclass
class SparsifyResult:
    """``model`` is the object that went in, its weights now exactly N:M; ``report`` is plain data for report.json."""

    model: nn.Module
    report: dict[str, Any] = field(repr=False)


@checked
@torch.inference_mode(False)
@torch.enable_grad()  # training needs both, whatever the caller stands in
def sparsify(
    model: nn.Module,
    data: Any = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    pattern: str | AnyPattern = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tokenizer: Any = None,
    text_column: str | None = None,
    separator: str | None = None,
    cache_dir: str | Path | None = None,
    steps: Count | None = None,
    tokens: Count | None = None,
    batch_size: Count = 4,
    length: Count = 512,
    accumulate: Count = 1,
    lr: Positive = 5e-4,
    w_task: AtLeastZero = 1.0,
    w_kl: AtLeastZero = 1.0,
    divergence: str = "kl",
    features: str | None = None,
    w_features: AtLeastZero = 1.0,
    slorb_block: Count | None = None,
    calibration: Count = 64,
    example_inputs: Any = None,
    seed: int = 0,
    compile: bool | str = "auto",
    resume_from: str | Path | None = None,
    save_seconds: AtLeastZero = 600.0,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **changes: Any,
) -> SparsifyResult:
    """Make ``model`` exactly N:M sparse, in place, and keep its accuracy by distilling the dense model into it.

    Args:
        model: any nn.Module that torch.export takes.
        data: training data: a hub id, a text / jsonl / parquet file, a folder of them, a list of strings (these need a
            ``tokenizer``), token ids [n] or [n, length], a DataLoader, or any list of batches. None: the weights alone
            decide (``magnitude``). ``"self"``: text drawn from the language model itself.
        text_column, separator, cache_dir: of text: the column of its rows (default: the one that stands out, or chats,
            which go through the tokenizer's chat template), what stands between documents (default: the tokenizer's
            end of sequence), and where its token file is kept (default: the Hugging Face home).
        method: trained with distillation: ``sparseforge`` (the default with data), ``gmp``, ``imp``, ``sr-ste``,
            ``ast``, ``cast``, ``maskllm``, ``maskpro``; layer by layer without training: ``alps``, ``sparsegpt``,
            ``wanda``; without data: ``magnitude``.
        preset: of sparseforge: ``tuned`` (ours, the default) or ``paper`` (arXiv 2605.06402's constants).
            ``changes`` replace single fields of the method's config.
        pattern: ``"2:4"``, any N:M, or ``"50%"`` for zeros without a structure.
        include, exclude: globs over weight or module names.
        steps, tokens: length of the run; one of them (default: 60 steps). A step takes ``batch_size`` sequences of
            ``length`` tokens, or one batch of the data, times ``accumulate`` and the number of processes. ``tokens``
            is the budget of the whole run, in real tokens (padding does not count; samples where there are no tokens),
            over all micro-batches and processes: the run takes as many steps as fit into it.
        lr: peak learning rate. 5e-4 was best for SmolLM2-135M in runs of 60 steps; the authors take 1e-4 for 7B and
            20,000 steps.
        w_task, w_kl: weights of cross-entropy and of the divergence from the dense teacher.
        divergence: ``kl`` (teacher || student) or ``reverse_kl``.
        features, w_features: a loss on intermediate values beside it, and its weight: ``squarehead``, ``tinybert`` or
            ``mobilebert``; the values are found in the graph.
        slorb_block: width of the blocks of a SLoRB branch; None for none. It starts with what the masks take away, S =
            mean over each block of W (1 - m) (AST's eq. 6): at once where masks are hard from the start, in parts
            where they harden by and by; at zero after ``sparsegpt`` or ``alps``, whose survivors took it over.
        calibration: sequences (of the training data) that a layer-wise start or method sees.
        example_inputs: for capture, where they cannot be made from the model's config or from ``data``.
        compile: True, False or "auto".
        resume_from: file of the training state: written every ``save_seconds``, read if it exists, removed by nobody.
            The run that wrote it must have had the same weights, data, seed, rate and losses.

    Returns SparsifyResult. Raises SparseForgeError on anything that is wrong. Whatever else ends the call (Ctrl-C, an
    error of ``on_step``) leaves the model dense as it was, too, to the bit.
    """
    began, given = time.monotonic(), dict(locals())
    chosen = method or ("magnitude" if data is None else "sparseforge")
    preset, configure = find_method(chosen, preset)
    if chosen != "magnitude" and data is None:
        raise SparseForgeError(
            f"method {chosen} needs data: pass text, tokens or batches, or data='self' for a language model"
        )
    if steps is not None and tokens is not None:
        raise SparseForgeError(f"steps={steps} and tokens={tokens} both set the length of the run: give one of them")
    shape = parse_pattern(pattern)
    check_losses(divergence, features)
    unknown = set(changes) - set(find_options(chosen, preset))
    if unknown:
        raise SparseForgeError(f"method {chosen} has no option {', '.join(sorted(unknown))}")
    if slorb_block is not None and configure is None:
        raise SparseForgeError(f"slorb_block: method {chosen} trains no low-rank branch: take a trained one, e.g. ast")
    solve = LAYERWISE[chosen](shape, **changes) if chosen in LAYERWISE else None
    check_weights(model)
    if resume_from is not None:
        check_parent(Path(resume_from))
    if configure is not None:
        configure(steps or 60, shape, **changes)  # what is wrong with it is found out before anything is read
        accelerator = accelerator or processes.accelerator()
    torch.manual_seed(seed)
    batches = None
    if chosen != "magnitude":
        a_step = batch_size * length * accumulate * (accelerator.num_processes if accelerator is not None else 1)
        needed = calibration * length if chosen in LAYERWISE else tokens or (steps or 60) * a_step
        if isinstance(data, str) and data == "self":
            check_length(model, length)
            begun = tokenizer is not None and leading_bos(tokenizer) is not None
            data = draw_text(model, needed, length=length, seed=seed, keep_start=begun)
        batches = as_batches(
            data,
            tokenizer,
            batch_size=batch_size,
            length=length,
            seed=seed,
            limit_tokens=needed,
            cache_dir=cache_dir,
            text_column=text_column,
            separator=separator,
        )
        if example_inputs is None:
            example_inputs = example_inputs_of(model, batches.batch(0))
    program = capture(model, example_inputs)
    sites = find_linears(program, shape, include, exclude)
    check_sites(program, sites)
    notes = [*program.notes, *(unused_text(data, text_column) if is_text(data) and data != "self" else ())]
    notes += adapter_notes(model, [program.tensor(s.fqn) for s in eligible(sites)])
    reader = Reader(program)
    if batches is not None:
        objective = Objective(w_task, w_kl, divergence, getattr(model, "config", None), reader.note)
        check_batch(program, reader, objective, batches.batch(0))
    report: dict[str, Any] = {
        "method": chosen,
        "pattern": str(shape),
        "seed": seed,
        "notes": notes,
        **describe_sites(sites),
        **environment(),
    }
    if configure is not None:
        assert batches is not None and accelerator is not None
        per_step = accumulate * accelerator.num_processes
        count = steps or (count_steps(batches, tokens, per_step) if tokens else 60)
        config = configure(count, shape, **changes)
        losses = {
            "w_task": w_task,
            "w_kl": w_kl,
            "divergence": divergence,
            "features": features,
            "w_features": w_features,
        }
        calibrated = _first(batches, calibration, notes) if config.start != "dense" else None
        notes += unused_arguments(
            sparsify, given, method=chosen, trains=True, calibrates=calibrated is not None, batches=batches
        )
        run = {
            "seed": seed,
            "batch_size": batch_size,
            "length": length,
            "calibration": calibration,
            "slorb_block": slorb_block,
            "dtype": str(program.tensor(eligible(sites)[0].fqn).dtype),
        }
        if resume_from is not None:
            run |= {"weights": fingerprint.of_tensors(program.state), "data": fingerprint.of_batches(batches)}
        if slorb_block is not None:
            report["notes"].append(
                "the low-rank branches (slorb_block) are saved beside the weights: sf.load_model and sf.load rebuild "
                "them, transformers' own from_pretrained leaves them out"
            )
        report |= {
            "preset": preset,
            "config": config.describe(),
            "lr": lr,
            **losses,
            "slorb_block": slorb_block,
            "batch_size": batch_size,
            "length": length,
            "accumulate": accumulate,
        }
        report["curves"] = _anneal(
            program,
            sites,
            config,
            batches,
            calibrated,
            losses=losses,
            slorb_block=slorb_block,
            lr=lr,
            accumulate=accumulate,
            state_path=Path(resume_from) if resume_from else None,
            run=run,
            save_seconds=save_seconds,
            compile=compile,
            accelerator=accelerator,
            show_progress=show_progress,
            on_step=on_step,
            report=report,
        )
        report["tokens"] = report["curves"][-1]["tokens"] if report["curves"] else 0
        report["epochs"] = batches.passes(count * per_step)
        if (report["epochs"] or 0) > 1:
            report["notes"].append(f"the run went over its data {report['epochs']:.1f} times")
    else:
        one_shot = None if batches is None else _first(batches, calibration, notes)
        notes += unused_arguments(
            sparsify, given, method=chosen, trains=False, calibrates=one_shot is not None, batches=batches
        )
        report["options"] = changes
        report["calibration_sequences"] = sum(count_rows(b) for b in one_shot or ())
        readings = [reader.read(*as_call(b)) for b in one_shot or ()]
        report["layer_notes"] = _prune_once(program, sites, shape, solve, readings)
    notes += [n for n in reader.notes if n not in notes]
    notes += _by_text(report.get("layer_notes") or {})
    report["density"] = {s.fqn: density(program.tensor(s.fqn)) for s in eligible(sites)}
    report["seconds"] = time.monotonic() - began
    report["peak_memory_bytes"] = peak_memory_bytes()
    return SparsifyResult(model, report)


def _by_text(layer_notes: Mapping[str, str]) -> list[str]:
    """A sentence for every text, with the weights that it is about."""
    names: dict[str, list[str]] = {}
    for fqn, text in layer_notes.items():
        names.setdefault(text, []).append(fqn)
    return [
        f"{text}: {', '.join(found[:3])}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        for text, found in names.items()
    ]


def _anneal(
    program: Exported,
    sites: list[LinearSite],
    config: MethodConfig,
    batches,
    calibrated,
    *,
    report: dict,
    losses: dict[str, Any],
    slorb_block: int | None,
    state_path: Path | None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the sites and every vector parameter (norms, biases); matrices that are not sites keep their values."""
    assert program.source is not None
    site_ids = {id(program.tensor(s.fqn)) for s in eligible(sites)}
    wanted = {id(p): p.requires_grad for p in program.source.parameters()}
    sparse: SparseModel | None = None
    with dense_again_on_error(program) as written:
        try:
            frozen_model = not any(wanted.values())  # as it comes from a loader: nobody froze a part of it
            adapters = find_adapters(program.source).own
            for p in program.source.parameters():
                vector = p.is_floating_point() and p.dim() < 2 and (wanted[id(p)] or frozen_model)
                vector &= id(p) not in adapters
                p.requires_grad_(id(p) in site_ids or (vector and config.trains_weights))
                p.grad = None  # of another loss
            sparse = SparseModel(program, sites, config, slorb_block=slorb_block, **losses)
            written += sparse.copies()
            if calibrated is not None and not (state_path and state_path.exists()):
                clock = time.monotonic()
                report["layer_notes"] = sparse.calibrate(calibrated)
                report["calibration_sequences"] = sum(count_rows(b) for b in calibrated)
                report["calibration_seconds"] = time.monotonic() - clock
            report["passes"] = [r._asdict() for r in sparse.pass_records]
            curves = train(sparse, batches, sparse.trainable(), state_path=state_path, **options)
            report["notes"] += [n for n in sparse.reader.notes if n not in report["notes"]]
            finalize(sparse)
        finally:
            if sparse is not None:
                sparse.release()
            for p in program.source.parameters():
                p.requires_grad_(wanted.get(id(p), True))  # low-rank branches are new
                p.grad = None
    return curves


@torch.no_grad()
def _prune_once(
    program: Exported, sites: list[LinearSite], pattern: AnyPattern, solve: Solve | None, batches: list[Reading]
) -> dict[str, str]:
    masked, _ = run_passes(program, train_passes(sites))
    weights = [
        MaskedWeight(s.fqn, masked.tensor(s.fqn), masked.tensor(mask_name(s.fqn)), s.reduction_dim)
        for s in eligible(sites)
    ]
    notes: dict[str, str] = {}
    with undone_on_error(weights):
        if solve is None:
            magnitude(weights, pattern)
        else:
            notes = prune_layer_by_layer(masked, weights, batches, solve)
        run_passes(masked, harden_passes(pattern))
        assert all(check_pattern(w.weight, pattern, w.dim) for w in weights)
    return notes


@torch.no_grad()
def draw_text(
    model: nn.Module, tokens: int, *, length: int, seed: int = 0, batch: int = 16, keep_start: bool = False
) -> Tensor:
    """Token ids [n, length] sampled from a language model at temperature 1, from its own start token (data-free
    distillation), which stays as the first of them if ``keep_start``."""
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "generate"):
        raise SparseForgeError(f"{type(model).__name__} cannot generate text: pass data")
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if isinstance(start, list):
        start = start[0]
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    rows = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would be in the text
    try:
        for _ in range(-(-tokens // (batch * length))):
            first = torch.full((batch, 1), start or 0, device=device)
            text = model.generate(  # type: ignore[operator]
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=start or 0,
            )
            rows.append(text[:, :length] if keep_start else text[:, 1:])
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(rows)


def _first(batches: Batches, sequences: int, notes: list[str]) -> list[Any]:
    """The first batches that hold so many sequences, none twice; a note where the data has fewer."""
    chosen: list[Any] = []
    found, rows = batches.first_pass(), 0
    while rows < sequences:
        batch = next(found, None)
        if batch is None:
            notes.append(f"asked for {sequences} calibration sequences, the data has {rows}")
            break
        chosen.append(batch)
        rows += count_rows(batch)
    return chosen
