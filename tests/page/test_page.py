"""report.html: what it says, what it is made of, and how a browser shows it."""

import json
import shutil
from html.parser import HTMLParser

import pytest

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.page.page import COSTS, PAGE, PLAN, QUALITY, SPEED, write_page
from sparseforge_fx.plans import Plan, PlannedWeight, Price

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q_proj", "attn.o_proj", "mlp.up_proj")]
ROW = {"loss": 3.0, "task": 2.0, "kl": 1.0, "temperature": 1.0, "lambda": 1.0, "lr": 1e-3, "grad_norm": 1.0}
ROW |= {"mask_distance_from_binary": 0.1, "density": 0.9, "flip_rate": 0.01, "seconds": 2.0}
REPORT = {
    "method": "sparseforge",
    "preset": "annealed",
    "pattern": "2:4",
    "sites": [{"name": n, "out": 8, "in": 16} for n in NAMES],
    "site_parameters": 1152,
    "skipped": [{"name": "head<b>.weight", "shape": [10, 8], "reason": "it is an output layer & stays"}],
    "notes": ["batch_size is given and not used: <the data are batches>"],
    "curves": [{"step": s, "tokens": 64 * s, **ROW, "loss": 3 / s, "flip_rate": 0.1 / s} for s in range(1, 9)],
    "tokens": 512,
    "density": dict.fromkeys(NAMES, 0.5),
    "layers": {n: {"kept": 0.8 + i / 100, "moved": 0.5, "curvature": 10.0**-i} for i, n in enumerate(NAMES)},
    "reconstruction": [{"block": "model.layers.0", "before": 0.125, "after": 0.03}],
    "experts": {"model.layers.0.mlp.experts.up": {"tokens": [1200, 7], "error": [0.05, None], "by_magnitude": [1]}},
    "seconds": 3723.0,
    "peak_memory_bytes": 2_500_000_000,
    "device": "a CPU",
    "threads": 2,
    "commit": None,
    "versions": {"torch": "2.13"},
    "recipe": {"model": "/home/me/tiny", "plan": None},
}
MEASURED = {"nll_per_token": 3.0, "stderr": 0.01, "tokens_scored": 155, "windows": 5, "context": 32}
QUALITIES = {
    "model": "/home/me/out",
    "dense": "/home/me/tiny",
    "data": "/home/me/test.txt",
    "perplexity": {"dense": {**MEASURED, "perplexity": 20.09}, "model": {**MEASURED, "perplexity": 25.31}},
    "paired": {"difference": 0.231, "stderr": 0.012, "pairs": 5, "p": 0.0312},
    "zero_shot": {role: {"rte": {"acc": 0.5, "acc_stderr": 0.05, "documents": 100}} for role in ("dense", "model")},
    "paired_tasks": {"rte": {"difference": -0.03, "p": 0.7}},
    "texts": [{"prompt": "The sky", "dense": " is blue.", "model": " is <green>."}],
}
TIMES = {"tokens_per_second": 10.0, "quartiles": [9.0, 11.0], "ratio": 1.0}
SPEEDS = {"batches": {"1": {"dense": TIMES, "packed": {**TIMES, "tokens_per_second": 15.5, "ratio": 1.55}}}}
COST = {"out": 8, "in": 16, "format": "2:4 int8", "layout": "rows", "tokens": 1}
COST |= {"dense_us": 2.0, "packed_us": 1.0, "ratio": 2.0}


class Parsed(HTMLParser):
    """What the page has of each kind of element, and all of its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def write(folder, report=REPORT, **beside):
    files = {"report.json": report, **{f"{n}.json": content for n, content in beside.items()}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text("model: /home/me/tiny\n")
    return write_page(folder).read_text(encoding="utf-8")


@pytest.fixture
def full(tmp_path):
    int8, prices = parse_format("2:4 int8"), {1: 5.0, 8: 9.0}
    weights = [
        PlannedWeight(n, (8, 16), int8, {DENSE: Price(0.0, 256.0, prices), int8: Price(0.01, 80.0, prices)})
        for n in NAMES
    ]
    Plan(weights, (1, 8), {"speedup": 1.0}, "a machine", 1).save(tmp_path / PLAN)
    return write(tmp_path, evaluation=QUALITIES, benchmark=SPEEDS, costs={"rows": [COST]})


def test_it_says_what_was_done_and_measured(full):
    text = Parsed(full).text
    for said in (
        "tiny, 2:4 sparse",
        "9 linears with 1,152 weights were made 2:4 sparse by sparseforge (annealed), trained on 512 tokens in 8 steps",
        "that took 1 h 2 min on a CPU.",
        "20.09 → 25.31",
        "25.31 ± 0.2531",
        "+0.2310 ± 0.0120 nats per token from the dense one, in pairs over 5 windows (p = 0.031)",
        "50.0 ± 5.0",
        "-3.0 (p = 0.7)",
        "is <green>.",
        "1.55x",
        "8 x 16 2:4 int8 rows 1 2.0 1.0 2.00x",
        "temperature 1",
        "batch_size is given and not used: <the data are batches>",
        "it is an output layer & stays",
        "sparseforge-fx sparsify --config",
        "model: /home/me/tiny",
        "Predicted loss",
        "model.layers.0 12.50% 3.00%",
        "model.layers.0.mlp.experts.up 2 7 604 1,200 5.0% 5.0% 1",
        "Each expert model.layers.0.mlp.experts.up expert tokens error by magnitude 0 1,200 5.0% 1 7 yes",
    ):
        assert said in text, said
    assert "Not measured yet" not in text and "/home/me/test.txt" not in text  # whoever gets it has no such folder


def test_thousands_of_experts_are_a_line_for_every_stack(tmp_path):
    one = {"tokens": [9] * 256, "error": [0.5] * 256, "by_magnitude": []}
    page = write(tmp_path, REPORT | {"experts": {f"m.{i}.up": one for i in range(96)}})
    assert "Each expert" not in page and "Single experts are too many for a page: report.json has each." in page
    assert len(page) < 200_000


def test_what_nobody_measured_has_the_command_that_does(tmp_path):
    text = Parsed(write(tmp_path)).text
    assert text.count("Not measured yet") == 2
    assert f"sparseforge-fx evaluate {tmp_path.name} --dense /home/me/tiny" in text
    assert f"sparseforge-fx benchmark {tmp_path.name}" in text


def test_one_page_that_needs_nothing_else_and_can_be_read_aloud(full):
    page = Parsed(full)
    assert len(full) < 400_000
    assert len(page.all("h1")) == 1 and not page.all("script", "img", "iframe", "object")
    assert [a["rel"] for a in page.all("link")] == ["icon"] and "url(http" not in full and "@import" not in full
    assert all(a.get("href", "#").startswith(("#", "data:")) for a in page.all("a", "link"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for a in page.all("section"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 5
    pictures = page.all("svg")
    assert len(pictures) == 4 and all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert any("goes from 3 to 0.375" in a["aria-label"] for a in pictures)
    assert any(
        "this run's plan: 1x for 0.09 nats; dense: 1x for 0 nats; 2:4 int8: 1x" in a["aria-label"] for a in pictures
    )
    assert not any(colour in full for colour in ("#0101", "#0202", "#0303"))  # the page's own, light and dark


def test_a_plan_whose_formats_were_changed_by_hand_has_no_predicted_frontier(full, tmp_path):
    assert "as the plan predicts them" in full
    plan = Plan.read(tmp_path / PLAN)
    plan.weights[0].format = parse_format("dense int8")
    plan.save(tmp_path / PLAN)
    assert "as the plan predicts them" not in write_page(tmp_path).read_text(encoding="utf-8")


def test_a_run_that_does_not_train(tmp_path):
    report = {k: v for k, v in REPORT.items() if k not in ("curves", "tokens", "layers", "preset", "recipe", "notes")}
    text = Parsed(write(tmp_path, report | {"skipped": [], "density": {"w": 0.25}, "calibration_sequences": 8})).text
    assert "A model, 2:4 sparse" in text and "layer by layer on 8 sequences" in text
    for said in ("This method does not train.", "Everything that was given was used.", "Every linear is sparse."):
        assert said in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("report.json", {"method": "x"}, "no whole report"),
        ("report.json", REPORT | {"curves": [3]}, "no whole report"),
        (QUALITY, QUALITIES | {"perplexity": {"dense": {}}}, "no whole report"),
        (SPEED, [], "holds no mapping"),
        (COSTS, {"rows": [{}]}, "no whole report"),
        (PLAN, {"version": 1}, "plan.json is not a plan"),
    ],
)
def test_a_damaged_file(tmp_path, name, content, says):
    write(tmp_path)
    before = (tmp_path / PAGE).read_text()
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SparseForgeError, match=says):
        write_page(tmp_path)
    assert (tmp_path / PAGE).read_text() == before


def test_no_report(tmp_path):
    with pytest.raises(SparseForgeError, match=r"there is no report\.json"):
        write_page(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(SparseForgeError, match="is not json"):
        write_page(tmp_path)
    assert not (tmp_path / PAGE).exists()


# -- in a browser ----------------------------------------------------------------------------------------------------
#: contrast of every element that has text of its own, against what is painted behind it
LOW_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
                       return canvas.getImageData(0, 0, 1, 1).data };
  const light = p => [0, 1, 2].map(i => p[i] / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                     .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const e of document.querySelectorAll('main *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.closest('defs, style, title')) continue;
    let behind = e;
    while (behind && paint(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [ink, getComputedStyle(behind || document.body).backgroundColor].map(c => light(paint(c))).sort();
    if ((b + .05) / (a + .05) < 4.5) found.push(e.tagName + ' ' + e.textContent.trim().slice(0, 20));
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium to show the page")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(browser, full, tmp_path, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    heard, asked = [], []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / PAGE).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert heard == [] and asked == [(tmp_path / PAGE).as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to push sideways but in a table
    assert page.evaluate(LOW_CONTRAST) == []
    page.close()
