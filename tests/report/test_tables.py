import io
import re

import pytest
from rich.console import Console

from glcan.report import tables


def test_the_table_gives_every_number_with_its_unit_and_ratio(comparison):
    text = tables.markdown(comparison)
    header, _, *body = [line for line in text.splitlines() if line.startswith("|")]
    assert "| test accuracy (%) | Δ (points) |" in header
    assert len(body) == 3
    assert body[2] == (
        "| glcan:4 | 4 | 94.00 ± 2.00 | -1.00 | 25 MiB (0.25×) | 20 MiB (0.25×) | 30.9 ms (0.25×) | 250 M (0.25×) "
        "| 12,345 |"
    )


def test_markdown_says_what_was_compared_and_with_what(comparison):
    text = tables.markdown(comparison)
    assert text.startswith("# cifar_resnet20 on digits, 3 epochs, 2 seeds (0, 1), batch 64\n")
    assert "Measured with torch 2.8, device cpu." in text
    assert "gpu" not in text


def test_without_end_to_end_there_are_no_ratios(comparison):
    comparison["methods"] = comparison["methods"][2:]
    comparison["methods"][0]["vs_e2e"] = None
    (row,) = tables.rows(comparison)
    assert row[3] == "–"
    assert not any("×" in cell for cell in row)


def test_one_seed_has_no_spread(comparison):
    comparison["seeds"] = [3]
    for method in comparison["methods"]:
        method["metric"]["std"] = None
    assert tables.rows(comparison)[0][2] == "95.00"
    assert "1 seed (3)" in tables.title(comparison)


def test_a_metric_that_is_no_fraction_is_printed_as_it_is(comparison):
    for method in comparison["methods"]:
        method["metric"] |= {"name": "psnr", "unit": "dB", "mean": 31.5}
        method["vs_e2e"]["metric_delta"] = -0.25
    assert tables.columns(comparison)[2:4] == ["psnr (dB)", "Δ (dB)"]
    assert tables.rows(comparison)[0][2:4] == ["31.50 ± 0.01", "-0.25"]


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_shows_every_number_even_when_it_is_narrow(comparison, width):
    comparison["methods"][1]["name"] = "checkpoint-sqrt"
    comparison["methods"][2]["name"] = "glcan:16+start+finish"
    console = Console(width=width, file=io.StringIO())
    console.print(tables.terminal(comparison))
    text = console.file.getvalue()
    assert "…" not in text
    for row in tables.rows(comparison):
        for cell in row:
            for part in re.split(r" (?=[(±])|(?=\+)", cell):
                assert part in text
