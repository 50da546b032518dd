"""`make gpu`, dry: a model of two layers on the CPU shows that its pieces run, resume, and say what is missing."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/bench"), str(ROOT / "data_scripts")]
import gpu  # noqa: E402
import update_readme  # noqa: E402

pytestmark = pytest.mark.xdist_group("gpu_script")  # one process makes the dry run for all


def call(monkeypatch, *arguments):
    """Run the script's `main` with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


def written_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The options of a dry run, its folder with the results of a first call, and the exit code."""
    folder, notebooks = tmp_path_factory.mktemp("gpu"), tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_code_cell('device = ""'), nbformat.v4.new_code_cell("print(device)")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebooks / "00_small.ipynb")
    del cells[0]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebooks / "01_unmarked.ipynb")
    options = ["--device", "cpu", "--tiny", "--out", folder, "--notebooks", notebooks]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MINICPT_DATA", raising=False)
        code = call(patch, *options)
    return options, folder, code


@pytest.mark.slow
def test_every_stage_runs_and_a_piece_that_cannot_says_why(dry_run):
    _, folder, code = dry_run
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    states = {result["piece"]: result["state"] for result in results}
    assert {name.split("/")[0] for name in states} == {*gpu.SECTIONS}
    assert "failed" not in states.values() and code == 0
    skipped = {
        result["piece"]: result["reason"] for result in results if result["state"] == "skipped"
    }
    assert "set_sync_debug_mode" in skipped.pop("waits/methods")
    assert {*skipped} == {f"table/{name}" for name in gpu.DATASETS}
    assert all("MINICPT_DATA" in reason or "make smollm2" in reason for reason in skipped.values())
    assert all(result["seconds"] < gpu.LIMIT for result in results)


@pytest.mark.slow
def test_a_marked_notebook_runs_on_the_device_that_is_asked_for(dry_run):
    _, folder, _ = dry_run
    (path,) = (folder / "notebooks").glob("*.ipynb")
    cells = nbformat.read(path, 4).cells
    assert path.name == "00_small.ipynb"
    assert [cell.outputs[0].text for cell in cells if cell.get("outputs")] == ["cpu\n"]


def test_the_notebooks_with_a_device_are_found():
    marked = {
        path.stem[:2]
        for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")
        if gpu.takes_device(path)
    }
    assert {"09", "13", "14"} <= marked
    assert not {"10", "11", "12"} & marked


@pytest.mark.slow
def test_the_report_has_every_number_and_says_that_it_is_no_gpus(dry_run):
    _, folder, _ = dry_run
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert update_readme.DRY_RUN in text and update_readme.gpu_report(folder / "report.md") is None
    step = json.loads((folder / "speed_tiny.json").read_text())["result"]["steps"]["B=4"]
    assert f"{step['PEFT'] / step['minicpt']:.1f}" in text
    for title, _ in gpu.SECTIONS.values():
        assert f"### {title}\n" in text or title.startswith(("How often", "SmolLM2"))
    assert "### What is missing, and why" in text and "waits/methods" in text
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<table>") == text.count("\n| ---") and "http" not in page


@pytest.mark.slow
def test_a_second_call_does_what_is_missing_and_nothing_else(dry_run, monkeypatch, capsys):
    options, folder, _ = dry_run
    monkeypatch.delenv("MINICPT_DATA", raising=False)
    (folder / "equality_pt.json").unlink()
    before = written_in(folder)
    assert call(monkeypatch, *options) == 0
    after = written_in(folder)
    again = {name for name in after if after[name] != before.get(name)}
    assert again == {"equality_pt.json", "waits_methods.json"} | {
        f"table_{name}.json" for name in gpu.DATASETS
    }
    # made on another machine, a result is no result
    path = folder / "attention_tiny.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"machine": {"device": "cuda"}}))
    call(monkeypatch, *options, "--only", "attention")
    assert json.loads(path.read_text())["machine"] == result["machine"]
    capsys.readouterr()
    call(monkeypatch, *options, "--list")
    assert "done       attention/tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_a_piece_that_fails_stops_no_other_and_is_told(dry_run, monkeypatch, tmp_path):
    options, _, _ = dry_run

    def broken(settings, shape):
        raise AssertionError("the libraries disagree")

    monkeypatch.setattr(gpu, "speed", broken)
    monkeypatch.setattr(gpu, "cell", lambda settings, shape: gpu.require_data())
    monkeypatch.delenv("MINICPT_DATA", raising=False)
    options = [*options[:3], "--out", tmp_path, *options[5:]]
    assert call(monkeypatch, *options, "--only", "speed", "cell") == 1
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| speed/tiny | failed | AssertionError: the libraries disagree |" in text
    assert "| cell/tiny | skipped |" in text and "| equality/cpt | not run yet |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device here.*--device cpu --tiny"):
        call(monkeypatch, "--out", tmp_path)
    assert not os.listdir(tmp_path)


def test_a_model_that_does_not_fit_is_skipped_with_what_it_needs(monkeypatch, tmp_path):
    settings = gpu.Settings("cpu", tmp_path, False, tmp_path)
    monkeypatch.setattr(gpu.memory, "free_memory", lambda device: 2**30)
    with pytest.raises(gpu.Skip, match=r"Llama-3-8B needs about \d+\.\d GiB .*1.0 GiB are free"):
        gpu.model_of(settings, "Llama-3-8B")


def test_the_page_has_a_place_for_the_report_and_keeps_what_stands_there_without_one(tmp_path):
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert "a report" in update_readme.with_block(text, "gpu", "a report\n")
    path = tmp_path / "report.md"
    assert update_readme.gpu_report(path) is None
    path.write_text("a report\n", encoding="utf-8")
    assert update_readme.gpu_report(path) == "a report\n"
