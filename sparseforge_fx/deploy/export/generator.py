"""``load_generator``: runs what :func:`sparseforge_fx.export_generator` wrote."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import AOTICompiledModel, PT2ArchiveReader, load_pt2
from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR, WEIGHTS_DIR
from transformers import (
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sparseforge_fx.kernels.sparse_linear  # noqa: F401  (its operator stands in the graphs)
from sparseforge_fx.data.prompts import prompt_batch
from sparseforge_fx.deploy.export.archive import Archive, check_export, refuse_pickles
from sparseforge_fx.deploy.export.generation import GENERATOR_VERSION, SPEC_FILE, TOKENIZER_FOLDER, misfits
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.huge_pages import on_huge_pages
from sparseforge_fx.models.dense import explained
from sparseforge_fx.ranges import Count, CountFromZero, Positive, Seed, ShareAboveZero, checked

SLOTS = 128  # a cache grows by so many: attention reads them all, and growing copies it


class Generator:
    """Two graphs, one copy of the weights, and what is known of the model.

    Attributes:
        max_length: tokens of prompt and answer together.
        tokenizer: the one that was exported with the model, or None.
    """

    def __init__(
        self, prefill: Callable, decode: Callable, spec: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
    ):
        self._prefill, self._decode, self._spec = prefill, decode, spec
        self.tokenizer = tokenizer
        self.max_length: int = spec["max_length"]
        self.eos: list[int] = spec["eos_token_id"]
        self._vocabulary: int = spec.get("vocabulary") or 1 << 24  # files of before do not say
        self._penalty: float = spec.get("repetition_penalty") or 1.0
        self.pad: int = spec["pad_token_id"] if spec["pad_token_id"] is not None else next(iter(self.eos), 0)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Prompts [batch, length] -> [batch, length + new tokens]: :meth:`stream`, whose options it takes, at once."""
        new = [token[:, None].to(input_ids.device) for token in self.stream(input_ids, attention_mask, **options)]
        return torch.cat([input_ids, *new], dim=1)

    @checked
    @torch.inference_mode(False)  # the cache outlives whatever mode the first token was asked for in
    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: Count = 64,
        do_sample: bool = False,
        temperature: Positive = 1.0,
        top_k: CountFromZero = 0,
        top_p: ShareAboveZero = 1.0,
        seed: Seed | None = None,
        repetition_penalty: Positive | None = None,
    ) -> Iterator[Tensor]:
        """Yield the tokens [batch] that go on from prompts [batch, length], as they are made.

        Greedy, or with ``do_sample`` drawn from the distribution at ``temperature``, of its ``top_k`` likeliest tokens
        (0: all) and the likeliest that make up ``top_p``. A ``repetition_penalty`` above 1 makes tokens less likely
        that are there already (transformers'); None: the model's own. Prompts are padded on the left, where
        ``attention_mask`` is 0. A sequence that has ended is filled up with padding; the longest one decides. Raises
        SparseForgeError if prompt and answer do not fit the cache.
        """
        self._check_prompts(input_ids, attention_mask)
        rows, length = input_ids.shape
        if length + max_new_tokens > self.max_length or max_new_tokens < 1:
            raise SparseForgeError(
                f"{length} tokens of prompt and {max_new_tokens} new ones do not fit a cache of {self.max_length}: "
                "export the model with a larger max_length, or shorten the prompt"
            )
        penalty = self._penalty if repetition_penalty is None else repetition_penalty
        choose, looks_back = _chooser(do_sample, temperature, top_k, top_p, seed), do_sample or penalty != 1
        penalize = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(penalty))] if penalty != 1 else [])
        device = torch.device(self._spec["device"])
        dtype = getattr(torch, self._spec["dtype"])
        slots = self._room(length + 1)
        cache = [
            [torch.zeros(rows, slots, *shape, dtype=dtype, device=device) for shape in pair]
            for pair in self._spec["cache"]
        ]
        ids = input_ids.to(device).contiguous()  # compiled graphs trust the strides that they were made with
        mask = torch.zeros(rows, slots, dtype=torch.long, device=device)
        mask[:, :length] = 1 if attention_mask is None else attention_mask
        start = torch.zeros(1, dtype=torch.long, device=device)
        step = self._prefill if length > 1 else self._decode
        logits = self._run(step, input_ids=ids, mask=mask, start=start, cache=cache)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        stops = torch.tensor(self.eos, device=device)
        for slot in range(length, length + max_new_tokens):
            if penalize:
                logits = penalize(ids, logits.float())  # type: ignore[arg-type]  # as in _sampler
            token = choose(ids, logits).masked_fill(ended, self.pad)
            yield token.clone()  # whoever gets it may write into it
            ended |= torch.isin(token, stops)
            if slot + 1 == length + max_new_tokens or ended.all():
                return
            token = token.masked_fill(ended, 0)[:, None]  # any of the model's: the padding may be none
            if looks_back:
                ids = torch.cat([ids, token], dim=1)
            if slot == mask.shape[1]:
                more = self._room(slot + 1) - slot
                mask = F.pad(mask, (0, more))
                cache = [[F.pad(held, (0, 0, 0, 0, 0, more)) for held in pair] for pair in cache]
            mask[:, slot] = 1
            start.fill_(slot)
            logits = self._run(self._decode, input_ids=token, mask=mask, start=start, cache=cache)

    def _run(self, graph: Callable, **given: Any) -> Tensor:
        """In the dtypes that the graph was made in, and its cache is, whatever is cast around it."""
        with torch.autocast(self._spec["device"], enabled=False):
            return graph(**given)

    def _check_prompts(self, ids: Any, mask: Any) -> None:
        """Raise SparseForgeError for what no graph could take, or would take for something else."""
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.long or 0 in ids.shape:
            found = f"{ids.dtype} {[*ids.shape]}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise SparseForgeError(f"prompts are a tensor of int64 ids [batch, length], not {found}")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != ids.shape or not mask[:, -1].all():
                raise SparseForgeError(
                    "attention_mask is a tensor of the shape of the prompts and is 1 at their end: pad on the left"
                )
            if not ((mask == 0) | (mask == 1)).all():  # positions are counted by it
                raise SparseForgeError("attention_mask has other values than 0 and 1: 1 at tokens, 0 at padding")
        if len(unknown := ids[(ids < 0) | (ids >= self._vocabulary)]):  # compiled graphs would abort
            raise SparseForgeError(f"the model has no token {int(unknown[0])}: take the tokenizer that is the model's")

    def _room(self, tokens: int) -> int:
        """Slots of a cache for so many tokens."""
        return min(-(-tokens // SLOTS) * SLOTS, self.max_length)

    def text(self, prompt: str | list[str], **options: Any) -> list[str]:
        """The continuation of each prompt, by the tokenizer of the file; options as for :meth:`stream`."""
        if self.tokenizer is None:
            raise SparseForgeError("the file has no tokenizer: export it with one, or use generate() on token ids")
        batch = prompt_batch(self.tokenizer, [prompt] if isinstance(prompt, str) else prompt)
        out = self.generate(batch["input_ids"], batch["attention_mask"], **options)
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def load_generator(path: str | Path) -> Generator:
    """Load a file of :func:`sparseforge_fx.export_generator`.

    Its checksums are compared, nothing inflates, and of the format ``pt2`` nothing is unpickled and no library opened.
    All the same only from people you trust: the format ``aoti`` is compiled code, which runs, and torch evaluates the
    sizes in a graph of ``pt2`` as Python expressions. Who writes such a file on purpose writes checksums that fit.

    Raises SparseForgeError naming the file if it is not such a file, damaged, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise SparseForgeError(f"{path} is not there: write it with sf.export_generator")
    archive = Archive(path)
    spec = _read_spec(archive)
    check_export(path)
    compiled = spec["format"] == "aoti"
    if not compiled and any(name.startswith("data/aotinductor/") for name in archive.sizes):
        raise SparseForgeError(f"{path} has compiled code in it, which the format pt2 has not: export it anew")
    if not compiled or any(name.startswith("models/") for name in archive.sizes):
        refuse_pickles(archive)
    with explained(f"{path} cannot be loaded"):
        contents = load_pt2(str(path))
        if not compiled:
            first, second = (contents.exported_programs[name] for name in ("prefill", "decode"))
            _check_cache(first, spec)
            second.state_dict.update(first.state_dict)  # it was written with stand-ins
            prefill: Callable = first.module(check_guards=False)
            decode: Callable = second.module(check_guards=False)
        else:
            prefill, decode = contents.aoti_runners["prefill"], contents.aoti_runners["decode"]
            _give_weights(path, contents.aoti_runners)
        return Generator(prefill, decode, spec, _tokenizer(contents.extra_files))


def _give_weights(path: Path, runners: Mapping[str, AOTICompiledModel]) -> None:
    """As torch's loader does, which has no say in where they lie: both graphs get the weights of the file."""
    reader = PT2ArchiveReader(str(path))
    files = reader.get_file_names()
    stored = [file for file in files if file.startswith(WEIGHTS_DIR)]
    read = (torch.load(io.BytesIO(reader.read_bytes(file)), weights_only=True).detach() for file in stored)
    weights = dict(zip((file.removeprefix(WEIGHTS_DIR) for file in stored), on_huge_pages(read), strict=True))
    for name, runner in runners.items():
        (config,) = [
            f for f in files if f.startswith(f"{AOTINDUCTOR_DIR}{name}/") and f.endswith("weights_config.json")
        ]
        wanted = json.loads(reader.read_string(config))
        given = {weight: weights[file].as_strided(*strided) for weight, (file, *strided) in wanted.items()}
        runner.load_constants(given, check_full_update=True, user_managed=True)


def _check_cache(program: ExportedProgram, spec: dict[str, Any]) -> None:
    """Raise unless the graph was made for a cache of these heads and widths: it is allocated before the graph runs."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    expected = [shape for pair in spec["cache"] for shape in pair]
    if [list(map(int, v.shape[2:])) for v in values if v.dim() == 4] != expected:
        raise ValueError("the graph was made for another cache")


def _read_spec(archive: Archive) -> dict[str, Any]:
    """What the file says of itself, checked before anything else of it is read."""
    path = archive.path
    if f"extra/{SPEC_FILE}" not in archive.sizes:
        raise SparseForgeError(f"{path} is not a file of sf.export_generator, or it is damaged: export it anew")
    spec = archive.json(f"extra/{SPEC_FILE}")
    version = spec.get("version") if isinstance(spec, dict) else None
    if version != GENERATOR_VERSION:
        raise SparseForgeError(
            f"{path} is of version {str(version)[:40]} of its format and this package reads {GENERATOR_VERSION}: "
            "export it anew"
        )
    if misfits(spec):
        raise SparseForgeError(f"{path} describes its cache or tokens wrongly ({SPEC_FILE}): export it anew")
    if spec["device"] == "cuda" and not torch.cuda.is_available():
        raise SparseForgeError(f"{path} was exported for a CUDA device and there is none here: export it on the CPU")
    return spec


def _tokenizer(files: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    mine = {n.removeprefix(TOKENIZER_FOLDER): text for n, text in files.items() if n.startswith(TOKENIZER_FOLDER)}
    if not mine:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, text in mine.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _chooser(do_sample: bool, *how: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """From ids [batch, length] and logits [batch, vocab] to the next tokens [batch]."""
    if do_sample:
        return _sampler(*how)
    if how != (1.0, 0, 1.0, None):
        raise SparseForgeError("temperature, top_k, top_p and seed are for do_sample=True: set it, or leave them out")
    return lambda _, logits: logits.argmax(-1)


def _sampler(temperature: float, top_k: int, top_p: float, seed: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(top_p)))
    generators: dict[torch.device, torch.Generator] = {}

    def sample(ids: Tensor, logits: Tensor) -> Tensor:
        if logits.device not in generators:
            generators[logits.device] = torch.Generator(logits.device)
            if seed is None:
                generators[logits.device].seed()
            else:
                generators[logits.device].manual_seed(seed)
        probabilities = warpers(ids, logits.float()).softmax(-1)  # type: ignore[arg-type]  # a LongTensor, in its words
        return torch.multinomial(probabilities, 1, generator=generators[logits.device])[:, 0]

    return sample
