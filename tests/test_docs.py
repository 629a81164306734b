"""What the documents show is what the package does: their code runs, their commands exist."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest
import torch

import captum_attn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "tutorials" / "examples.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tutorials" / "results.md").read_text(encoding="utf-8")


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.M | re.S)


PYTHON = code_blocks(README, "python") + code_blocks(EXAMPLES, "python")


def load_digit_detr_in_colour() -> torch.nn.Module:
    """A detector for colour images that finds something: the demo's, on the channels' mean."""
    from captum_attn.toy.digit_detr import load_digit_detr

    class InColour(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = load_digit_detr()
            self.config = self.detector.config

        def forward(self, pixel_values, labels=None):
            small = torch.nn.functional.interpolate(pixel_values, 64).mean(1, keepdim=True)
            return self.detector(small * 0.3 + 0.3)

    return InColour().eval()


def text_and_image(tokenizer):
    """What ViLT's processor returns, without a download."""

    def processed(picture, question, return_tensors):
        ids = tokenizer(question, return_tensors=return_tensors)
        return {**ids, "pixel_values": torch.rand(1, 3, 64, 64)}

    return processed


@pytest.fixture
def small_models(monkeypatch):
    """Tiny random models in the place of those that the examples download."""
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    from captum_attn.toy.topics import load_topic_classifier

    tokenizer = load_topic_classifier().tokenizer
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # all that Llama takes
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["intermediate_size"] = 64
    bert = transformers.BertConfig(**sizes, vocab_size=len(tokenizer))
    llama = transformers.LlamaConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2)
    vit = transformers.ViTConfig(**sizes, num_labels=10)
    torch.manual_seed(0)
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained: create("vit_tiny_patch16_224", depth=2)
    )
    stand_ins = {
        "AutoTokenizer": tokenizer,
        "AutoImageProcessor": transformers.ViTImageProcessor(),
        "AutoModelForSequenceClassification": transformers.BertForSequenceClassification(bert),
        "AutoModelForImageClassification": transformers.ViTForImageClassification(vit),
        "AutoModelForCausalLM": transformers.LlamaForCausalLM(llama).eval(),
        "AutoModelForObjectDetection": load_digit_detr_in_colour(),
        "ViltProcessor": text_and_image(tokenizer),
        "ViltForQuestionAnswering": transformers.ViltForQuestionAnswering(
            transformers.ViltConfig(
                **sizes, vocab_size=len(tokenizer), image_size=64, patch_size=32, num_labels=7
            )
        ).eval(),
    }
    for auto, stand_in in stand_ins.items():
        loader = getattr(transformers, auto)
        monkeypatch.setattr(loader, "from_pretrained", lambda name, it=stand_in, **_: it)


def test_readme_examples_run(small_models, capsys, tmp_path, monkeypatch):
    vision, text, image, llm, both, found, written = (run_block(b, {}) for b in PYTHON[:7])
    assert vision["attributions"].shape == (1, 3, 224, 224)
    assert vision["heat"].shape == (1, 224, 224)
    assert text["attributions"]["input_ids"].shape == text["inputs"]["input_ids"].shape
    said = dict(re.findall(r"^(\S+) +(0\.\d{4})$", capsys.readouterr().out, re.M))
    numbers = {word: float(said[word]) for word in said if word.isalpha()}
    assert max(numbers, key=numbers.__getitem__) == "band"  # the map says something
    block = PYTHON[1]
    for word, told in re.findall(r"(\w+) (0\.\d{4})", block):
        assert numbers[word] == pytest.approx(float(told), abs=2e-4)
    assert image["why"].shape == image["flow"].shape == (1, 224, 224)
    assert llm["attributions"]["input_ids"].shape == llm["logits"].shape[:2]
    assert both["words"].shape == both["inputs"]["input_ids"][0].shape
    assert both["words"].sum() > 0 and both["heat"].sum() > 0 and both["heat"].shape == (64, 64)
    assert found["found"].maps.shape[1:] == found["picture"].size[::-1]
    n = written["prompt"]["input_ids"].shape[1]
    assert written["written"].matrix.shape == (1, 8, n + 7)
    beside = run_block(PYTHON[7], vision)  # it says that it goes on from the first
    assert [a.shape for a in [*beside["maps"], beside["smooth"]]] == [(1, 3, 224, 224)] * 3
    measured = run_block(PYTHON[8], vision)
    for name in ("positive", "between", "faithful"):
        assert measured[name].shape == (1,) and measured[name].isfinite()
    monkeypatch.chdir(tmp_path)
    drawn = run_block(PYTHON[9], vision)
    assert len([ax for ax in drawn["picture"].axes if ax.get_title() in drawn["beside"]]) == 2
    names = {"why.png", "why.html", "layers.png", "heads.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    visualizer = run_block(PYTHON[10], vision)["visualizer"]  # serves the image of the first
    assert visualizer.examples[0].label == int(vision["target"])
    visualizer.close()


def run_block(block: str, names: dict) -> dict:
    names = dict(names)
    exec(compile(block, "example", "exec", dont_inherit=True), names)
    return names


def test_there_are_eleven_examples_of_about_ten_lines():
    assert len(PYTHON) == 11
    for block in PYTHON:
        lines = [
            line for line in block.splitlines() if line and not line.startswith(("from", "imp"))
        ]
        assert len(lines) <= 10


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 180
    assert "tutorials/examples.md" in README and "tutorials/results.md" in README


def test_the_two_commands_come_first():
    first, second = code_blocks(README, "bash")[:2]
    assert "captum-attn demo" in first and "pytest" in second
    assert README.index(second) < README.index("![")


def test_ci_runs_the_command_of_the_readme():
    marked = re.search(r"<!-- test command -->\n```bash\n(.*?)```", README, re.S)
    assert marked and marked[1] == code_blocks(README, "bash")[1]
    script = (ROOT / ".ci" / "run").read_text()
    fresh, other = script.split("ruff check", 1)  # then what is slow, and what needs captum 0.8
    assert "<!-- test command -->" in fresh and "pytest" not in fresh
    assert "pytest -m slow" in other and "tests/insights/test_captum_insights.py" in other


def test_the_habits_are_those_of_contributing():
    """The workflow calls CI's own script; a commit is held to the commands that are documented."""
    yaml = pytest.importorskip("yaml")

    def read(path):
        return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))

    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    hooks = [hook["entry"] for repo in read(".pre-commit-config.yaml")["repos"]
             for hook in repo["hooks"]]  # fmt: skip
    assert hooks == ["ruff check", "ruff format --check", "mypy"]
    citation = read("CITATION.cff")
    assert citation["version"] == captum_attn.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_map_of_the_house_names_files_that_exist():
    """Six steps, the same in CONTRIBUTING and in `observe`; at most 15 words."""
    import captum_attn.observe

    told = captum_attn.observe.__doc__
    steps = re.findall(r"^(\d \w[\w ]*?)  ", CONTRIBUTING, re.M)
    assert steps == re.findall(r"^ +(\d \w[\w ]*?)  ", told, re.M)
    assert [step[0] for step in steps] == list("123456")
    assert 10 <= len(re.findall(r"^- [\w -]+: ", told, re.M)) <= 15
    for place in re.findall(r"\b(?:attr|observe)/[\w/]*(?:\.py|/)", CONTRIBUTING):
        assert (ROOT / "captum_attn" / place).exists(), place
    for place in re.findall(r"\b(?:capture|tracing|streams|vectors)/(?:\w+\.py)?", told):
        assert (ROOT / "captum_attn" / "observe" / place).exists(), place


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "tutorials/README.md",
                                  "tutorials/examples.md", "tutorials/results.md"])  # fmt: skip
def test_pictures_and_links_of_the_documents_exist(path):
    document = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", document):
        if not target.startswith("https://"):
            assert (ROOT / path).parent.joinpath(target).resolve().is_file(), target


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^\| `(\w+)`", README, re.M))))
def test_every_method_of_the_table_is_public(name):
    method = getattr(captum_attn, name)
    assert name in captum_attn.__all__
    for call in ("attribute", "attribute_tokens", "relevance_maps", "layer_maps", "describe"):
        assert callable(getattr(method, call)) and f"`{call}`" in README


def test_options_of_the_commands_exist():
    commands = re.findall(r"python -m (tests\.benchmarks\.\w+)(.*)", RESULTS)
    assert {module for module, _ in commands} == {
        "tests.benchmarks.benchmark",
        "tests.benchmarks.dashboard_memory",
        "tests.benchmarks.digit_share",
        "tests.benchmarks.detector_share",
        "tests.benchmarks.vqa_share",
        "tests.benchmarks.vit_tables",
        "tests.benchmarks.vqa_perturbation",
        "tests.benchmarks.detr_tables",
        "tests.benchmarks.perturbation_speed",
        "tests.benchmarks.lengths",
        "tests.benchmarks.recall",
        "tests.benchmarks.relevance",
        "tests.benchmarks.scaling",
    }
    for module, options in commands:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", options))


def test_the_method_of_contributing_runs():
    marked = re.search(
        r"<!-- method example: begin -->\s*```python\n(.*?)```\s*<!-- method example: end -->",
        CONTRIBUTING,
        re.S,
    )
    assert marked, "CONTRIBUTING.md has no method example between its two marks"
    block = marked[1]
    assert len(block.splitlines()) <= 20
    names: dict = {"__name__": "contributing"}
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.models.vision_transformer.VisionTransformer(num_classes=5, **options).eval()
    (method,) = (v for v in names.values() if getattr(v, "__module__", "") == "contributing")
    images = torch.randn(2, 3, 32, 32)
    attributions = method(model).attribute(images, target=torch.tensor([1, 4]))
    assert attributions.shape == images.shape and attributions.abs().sum() > 0


def test_the_rule_of_contributing_runs():
    marked = re.search(
        r"<!-- rule example: begin -->\s*```python\n(.*?)```\s*<!-- rule example: end -->",
        CONTRIBUTING,
        re.S,
    )
    assert marked, "CONTRIBUTING.md has no rule example between its two marks"
    assert len([line for line in marked[1].splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(marked[1], "CONTRIBUTING.md", "exec"), names)
    layer, x = torch.nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    y, w = layer(x).detach()[:, 1:2], layer.weight.detach()[1]
    kept = y / (y + torch.where(y < 0, -0.1, 0.1))
    torch.testing.assert_close(names["explain"](layer, x, 1), x * w * kept)


def test_the_documents_name_no_missing_extra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for document in (README, CONTRIBUTING, EXAMPLES):
        assert set(re.findall(r"pip install [^\n]*\.\[(\w+)\]", document)) <= extras


@pytest.mark.parametrize("path", sorted((ROOT / "captum_attn").rglob("*.py")), ids=lambda p: p.name)
def test_public_docstrings_keep_captums_order(path):
    """Args, then Returns, then Examples, wherever a docstring has them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            found = re.findall(r"^\s*(Args|Returns|Examples):", ast.get_docstring(node) or "", re.M)
            assert found == sorted(found, key=["Args", "Returns", "Examples"].index), node
