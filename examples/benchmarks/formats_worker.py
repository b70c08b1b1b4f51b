"""One format in a process of its own: load it, run it, say what it took. Started by formats.py, never by hand.

formats_worker.py KIND PATH REQUEST RESULT; REQUEST is a .pt file of the prompts, RESULT the json that is written. A batch of
more sequences than there are prompts begins with the first ones again.
"""

import json
import sys
import time

import torch


def loaders(device):
    """kind -> load(path) to the device, which gives (logits(ids), generate(ids, tokens), whether a cache is used)."""

    def transformers_model(path):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
        return _model(model)

    def packed_by_transformers(path):
        import sparseforge_fx  # noqa: F401  (registers the quantizer)

        return transformers_model(path)

    def packed(path):
        import sparseforge_fx as sf

        return _model(sf.load(path, device=device)[0])

    def program(path):
        return _forward(torch.export.load(path).module())

    def program_with_our_operator(path):
        import sparseforge_fx.kernels.sparse_linear  # noqa: F401

        return program(path)

    def package(path):
        return _forward(torch._inductor.aoti_load_package(path))

    def generator(path):
        import sparseforge_fx as sf

        loaded = sf.load_generator(path)
        logits = lambda ids: None  # noqa: E731  (its graphs give the last position's only)
        return logits, lambda ids, tokens: loaded.generate(ids, max_new_tokens=tokens), True

    return {
        "dense": transformers_model,
        "packed": packed,
        "packed-transformers": packed_by_transformers,
        "pt2": program_with_our_operator,
        "pt2-portable": program,
        "aoti": package,
        "generator-pt2": generator,
        "generator-aoti": generator,
        "generator-aoti-dense": generator,
    }


def _model(model):
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    options = {"do_sample": False, "pad_token_id": 0}

    def generate(ids, tokens):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)

    return lambda ids: model(ids).logits, generate, True


def _forward(run):
    def generate(ids, tokens):
        for _ in range(tokens):
            ids = torch.cat([ids, run(input_ids=ids)["logits"][:, -1:].argmax(-1)], dim=1)
        return ids

    return lambda ids: run(input_ids=ids)["logits"], generate, False


@torch.no_grad()
def main():
    kind, path, request, result = sys.argv[1:5]
    asked = torch.load(request)
    torch.set_num_threads(asked["threads"])
    before = _peak()
    clock = time.perf_counter()
    logits, generate, cached = loaders(asked["device"])[kind](path)
    loading = time.perf_counter() - clock
    peak = _peak()
    out = {"load_seconds": loading, "peak_bytes_before": before, "peak_bytes_loaded": peak, "cache": cached}
    if asked["device"] == "cuda":
        out["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    ids = asked["ids"].to(asked["device"])
    text = generate(ids[:1], asked["text_tokens"])
    speeds, firsts = {}, {}
    for rows in asked["batch"]:
        prompts, tokens = ids[torch.arange(rows) % len(ids)], asked["tokens"] if cached else 4
        generate(prompts, 2)
        seconds = {1: [], tokens: []}
        for _ in range(asked["rounds"] if cached else 1):
            for count, of in seconds.items():
                clock = time.perf_counter()
                generate(prompts, count)[0, -1].item()  # waits for the device
                of.append(time.perf_counter() - clock)
        speeds[rows], firsts[rows] = [rows * tokens / s for s in seconds[tokens]], seconds[1]
    found = logits(ids[:1])
    torch.save({"text": text.cpu(), "logits": None if found is None else found.cpu()}, f"{result}.pt")
    with open(result, "w") as file:
        json.dump({**out, "tokens_per_second": speeds, "first_token_seconds": firsts}, file)


def _peak():
    """Bytes; of this process alone (ru_maxrss starts at what its parent had)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
