"""A folder that tells the truth has no findings; each planted lie has one that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kiln.benchmarks.records.record import Gate, NoiseReport, Record
from kiln.benchmarks.records.store import RECORDS, append_record, read_records
from kiln.benchmarks.records.verify import Finding, verify_folder
from kiln.benchmarks.records.verify_verdict import verdict_of
from kiln.errors import UsageError

Make = Callable[..., Record]
Raw = dict[str, Any]


def rewrite(folder: Path, change: Callable[[Raw], Any], line: int = 0) -> str:
    """Change one record of a folder by hand, as somebody who cheats would; gives its id."""
    lines = (folder / RECORDS).read_text().splitlines()
    raw = json.loads(lines[line])
    change(raw)
    lines[line] = json.dumps(raw)
    (folder / RECORDS).write_text("\n".join(lines) + "\n")
    return str(raw["id"])


def found(folder: Path) -> list[str]:
    return [str(finding) for finding in verify_folder(folder).findings]


def test_what_is_true_has_no_findings(results: Path) -> None:
    verified = verify_folder(results)
    assert (verified.records, verified.findings) == (2, ())
    assert verified.images == len(list((results / "images").iterdir())) == 6


def test_a_changed_sample_is_found(results: Path) -> None:
    one = rewrite(results, lambda r: r["samples"][3].update(seconds=r["samples"][3]["seconds"] * 0.999))
    texts = found(results)
    assert any(t.startswith(f"{one}: stats.image.mean is") for t in texts)
    assert any("stats.unattributed" in t for t in texts)


def test_a_changed_median_is_found(results: Path) -> None:
    rewrite(results, lambda r: r["stats"]["image"].update(median=r["stats"]["image"]["median"] * 0.99), 1)
    (text,) = found(results)
    assert "stats.image.median is" in text
    assert "of the samples it is" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("outliers", [2]), ("modes", 2), ("p95", 1.0), ("interval", [0.9, 1.1]), ("count", 13)],
)
def test_every_other_figure_is_computed_again(results: Path, field: str, value: Any) -> None:
    rewrite(results, lambda r: r["stats"]["image"].update({field: value}))
    assert any(f"stats.image.{field}" in text for text in found(results))


def test_a_component_that_is_left_out_is_found(results: Path) -> None:
    rewrite(results, lambda r: r["stats"]["components"].pop("vae_decoder"))
    (text,) = found(results)
    assert text.endswith("stats.components.vae_decoder is not there, of the samples it is there")


def test_a_changed_prompt_is_found(results: Path) -> None:
    one = rewrite(results, lambda r: r["workload"]["prompts"].__setitem__(0, "green apple"))
    texts = found(results)
    assert any(t.startswith(f"{one}: prompts_digest is") for t in texts)
    assert any(t.startswith(f"{one}: key is") for t in texts)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("steps", 2, "key is"), ("seed", 6, "latents_digest is"), ("batch", 2, "key is")],
)
def test_a_changed_workload_is_found(results: Path, name: str, value: Any, said: str) -> None:
    rewrite(results, lambda r: r["workload"].update({name: value}))
    assert any(said in text for text in found(results))


def test_a_changed_picture_is_found(results: Path) -> None:
    (record, _) = read_records(results)
    path = results / record.images[0].file
    image = np.array(Image.open(path))
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(path)
    (text,) = found(results)
    assert text.startswith(f"{record.id}: image 1, {record.images[0].file}: the file's SHA-256 is")


def test_a_picture_that_was_replaced_with_its_digest_is_found(results: Path) -> None:
    (record, _) = read_records(results)
    image = np.array(Image.open(results / record.images[0].file))
    Image.fromarray(255 - image).save(results / "images/new.png")
    digest = hashlib.sha256((results / "images/new.png").read_bytes()).hexdigest()
    (results / "images/new.png").rename(results / f"images/{digest[:16]}.png")
    rewrite(results, lambda r: r["images"][0].update(sha256=digest, file=f"images/{digest[:16]}.png"))
    assert any("the pixels' SHA-256 is" in text for text in found(results))
    pixels = hashlib.sha256((255 - image).tobytes()).hexdigest()
    rewrite(results, lambda r: r["images"][0].update(pixels=pixels))
    texts = found(results)
    assert any("image 1: psnr_db is" in text for text in texts)
    assert any("image 1: ssim is" in text for text in texts)


def test_a_missing_picture_and_one_of_another_size_are_found(results: Path) -> None:
    (record, _) = read_records(results)
    (results / record.parity.reference_images[1].file).unlink()
    texts = found(results)
    assert len(texts) == 2  # both records name it
    assert all("reference image 2" in text and "cannot be read" in text for text in texts)


def test_swapped_pictures_are_found(results: Path) -> None:
    rewrite(results, lambda r: r["images"].reverse())
    assert any("images: prompts and seeds are [(1, 6), (0, 5)]" in text for text in found(results))


def test_a_better_metric_is_found(results: Path) -> None:
    rewrite(results, lambda r: r["images"][1]["metrics"].update(psnr_db=60.0))
    texts = found(results)
    assert any("image 2: psnr_db is 60.0, of the two pictures it is" in text for text in texts)


def test_a_better_gate_is_found(results: Path) -> None:
    rewrite(results, lambda r: r["parity"]["gates"][0].update(value=60.0))
    assert any("the gate psnr_db is 60, the worst of the images is" in text for text in found(results))


def lies() -> list[tuple[str, dict[str, Any], str]]:
    """A record that contradicts itself each: what is changed, and what is said."""
    gate = Gate("component", "unet", "relative_l2", 2e-4, 1e-4, True, False)
    noisy = NoiseReport("noisy", ("others took 9 %",))
    bad = NoiseReport("invalid", ("others took 60 %",))
    why = "parity of unet: relative_l2 0.0002, at most 0.0001 was expected"
    return [
        ("flipped", {"gates": (gate,), "reasons": (why,)}, "the verdict is valid, and has to be invalid"),
        (
            "gate flipped",
            {"gates": (replace(gate, passed=True),)},
            "the gate relative_l2 of unet passed, with",
        ),
        ("no value", {"gates": (replace(gate, value=None, passed=True),)}, "passed, with None and at most"),
        ("gate unsaid", {"gates": (gate,), "verdict": "invalid", "reasons": ("x",)}, "and no reason says so"),
        ("no parity", {"gates": ()}, "it was held against no reference"),
        (
            "noise unsaid",
            {"noise": noisy, "reasons": noisy.reasons},
            "the verdict is valid, and noisy follows from its noise, noisy, and its other reasons: none",
        ),
        (
            "noise hidden",
            {"noise": bad, "reasons": bad.reasons, "verdict": "noisy"},
            "the noise is invalid: others",
        ),
        (
            "noise dropped",
            {"noise": noisy, "verdict": "noisy"},
            "the reasons leave out what the noise report says",
        ),
        (
            "noise without",
            {"noise": NoiseReport("noisy"), "verdict": "noisy"},
            "the noise is noisy, and no reason",
        ),
        (
            "noise clean",
            {"noise": NoiseReport(reasons=("x",)), "reasons": ("x",)},
            "the noise is clean, and has",
        ),
        (
            "noisy without",
            {"verdict": "noisy"},
            "the verdict is noisy, and valid follows from its noise, clean",
        ),
        (
            "valid turned invalid",
            {"verdict": "invalid"},
            "the verdict is invalid, and valid follows from its noise, clean, and its other reasons: none",
        ),
        (
            "valid turned invalid for a remark",
            {"verdict": "invalid", "remarks": ("pictures not judged: the weights are random",)},
            "the verdict is invalid, and valid follows from its noise, clean, and its other reasons: none",
        ),
        (
            "noisy turned invalid",
            {"verdict": "invalid", "noise": noisy, "reasons": noisy.reasons},
            "the verdict is invalid, and noisy follows from its noise, noisy, and its other reasons: none",
        ),
        (
            "invalid turned valid",
            {"reasons": ("the worker died",)},
            "the verdict is valid, and invalid follows from its noise, clean, and its other reasons: the",
        ),
        (
            "invalid turned noisy",
            {"verdict": "noisy", "noise": noisy, "reasons": ("the worker died", *noisy.reasons)},
            "the verdict is noisy, and invalid follows from its noise, noisy, and its other reasons: the",
        ),
        (
            "a gate that failed nowhere",
            {"verdict": "invalid", "reasons": (why,)},
            f"a reason says {why!r}, and the record does not show it",
        ),
        (
            "timed after all",
            {"verdict": "invalid", "reasons": ("nothing was timed",)},
            "a reason says 'nothing was timed', and the record does not show it",
        ),
        (
            "not longer at all",
            {"verdict": "invalid", "reasons": ("the components take 3.0% longer than the whole",)},
            "longer than the whole', and the record does not show it",
        ),
        (
            "not in force",
            {"precision": "bf16"},
            "unet: the precision fp32 was asked for, and bf16 is in force",
        ),
        (
            "fallback",
            {"provider": "CPUExecutionProvider", "name": "onnxruntime-cuda"},
            "CUDAExecutionProvider was",
        ),
        ("silent", {"effective": {}}, "openvino does not say what is in force"),
        ("bimodal", {"times": [1.0, 1.5] * 10}, "the noise is clean, and the times fall into two groups"),
        ("nothing timed", {"timed": ()}, "nothing was timed"),
    ]


@pytest.mark.parametrize(
    ("changes", "said"), [(c, s) for _, c, s in lies()], ids=[name for name, _, _ in lies()]
)
def test_a_verdict_that_does_not_follow_is_found(
    make_record: Make, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    changes = dict(changes)
    noise = changes.pop("noise", None)
    gates = changes.pop("gates", None)
    forced = {name: changes.pop(name) for name in ("precision", "provider") if name in changes}
    record = make_record(**changes)
    if noise is not None:
        record = replace(record, noise=noise)
    if gates is not None:
        record = replace(record, parity=replace(record.parity, gates=gates))
    if forced:
        record = replace(record, effective={k: replace(e, **forced) for k, e in record.effective.items()})
    append_record(tmp_path, record)
    texts = found(tmp_path)
    assert any(said in text for text in texts), texts
    assert all(text.startswith(f"{record.id}: ") for text in texts)


def test_true_verdicts_of_all_kinds_have_no_findings(make_record: Make, tmp_path: Path) -> None:
    noisy = NoiseReport("noisy", ("others took 9 %",))
    gate = Gate("component", "unet", "relative_l2", 2e-4, 1e-4, True, False)
    made = [
        replace(
            make_record(run="20260101T000000Z-aaaaaaaa"), noise=noisy, verdict="noisy", reasons=noisy.reasons
        ),
        make_record(run="20260102T000000Z-aaaaaaaa", verdict="invalid", reasons=("the worker died",)),
        make_record(
            run="20260103T000000Z-aaaaaaaa", remarks=("pictures not judged: the weights are random",)
        ),
    ]
    bad = make_record(
        run="20260104T000000Z-aaaaaaaa", verdict="invalid", reasons=("parity of unet: relative_l2 0.0002",)
    )
    made.append(replace(bad, parity=replace(bad.parity, gates=(gate,))))
    for record in made:
        append_record(tmp_path, record)
    assert found(tmp_path) == []


OLD_REMARKS = [
    "compile_cold: the system's page cache could not be dropped",
    "took turns in group 1 of 2: all together would not fit into memory",
    "parity not judged: openvino-genai does not tell its precision",
    "pictures not judged: the weights are random",
    "LPIPS and CLIP score not told: a reason",
    "not explained: a reason",
    "parity not checked: a-peer starts from noise of its own",
    "3.4% of the time is outside of all components",
]


def test_remarks_that_an_older_kiln_put_among_the_reasons_are_told_apart(
    make_record: Make, tmp_path: Path
) -> None:
    append_record(tmp_path, make_record(reasons=tuple(OLD_REMARKS)))
    rewrite(tmp_path, lambda raw: raw.pop("remarks"))
    (record,) = read_records(tmp_path)
    assert (record.reasons, record.remarks) == ((), tuple(OLD_REMARKS))
    assert found(tmp_path) == []
    rewrite(tmp_path, lambda raw: raw.update(verdict="invalid"))
    assert any("the verdict is invalid, and valid follows" in text for text in found(tmp_path))
    # A reason for the verdict stays one.
    rewrite(tmp_path, lambda raw: raw["reasons"].append("parity not checked: --no-parity"))
    assert found(tmp_path) == []


def test_the_verdict_follows_from_reasons_and_noise() -> None:
    clean, noisy, bad = NoiseReport(), NoiseReport("noisy", ("n",)), NoiseReport("invalid", ("n",))
    assert verdict_of((), clean) == "valid"
    assert verdict_of(("x",), clean) == "invalid"
    assert verdict_of(("n",), noisy) == "noisy"
    assert verdict_of(("n", "x"), noisy) == "invalid"
    assert verdict_of(("n",), bad) == "invalid"


def test_samples_that_overlap_or_are_there_twice_are_found(make_record: Make, tmp_path: Path) -> None:
    record = make_record()
    rows = list(record.samples)
    rows[2] = replace(rows[2], started_ns=rows[1].started_ns + 1000)
    rows[5] = replace(rows[5], index=4)
    append_record(tmp_path, replace(record, samples=tuple(rows)))
    texts = found(tmp_path)
    assert any("samples 1 and 2 overlap" in text for text in texts)
    assert any("the indexes are not in order" in text for text in texts)


def test_lines_that_are_no_records_are_findings_and_the_rest_is_looked_at(results: Path) -> None:
    with (results / RECORDS).open("a") as file:
        file.write('{"id": 1}\n{"torn": ')
    findings = verify_folder(results).findings
    assert [finding.record for finding in findings] == ["line 3", "line 4"]
    assert "was not written to its end" in findings[1].text


def test_one_id_twice_is_found(results: Path) -> None:
    text = (results / RECORDS).read_text()
    (results / RECORDS).write_text(text + text.splitlines()[0] + "\n")
    (record, *_) = read_records(results)
    assert verify_folder(results).findings == (Finding(record.id, "is there 2 times"),)


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    (tmp_path / RECORDS).touch()
    with pytest.raises(UsageError, match="holds no records"):
        verify_folder(tmp_path)
