import pytest
from PIL import Image

from glcan.report import plots


def test_both_plots_are_written_and_can_be_read(comparison, tmp_path):
    paths = plots.write_plots(comparison, tmp_path)
    assert [path.name for path in paths] == ["metric_over_epochs.png", "metric_against_cost.png"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_the_curve_is_the_mean_over_seeds_in_percent(comparison):
    axes = plots.over_epochs(comparison).axes[0]
    assert axes.get_ylabel() == "val accuracy (%)"
    assert [line.get_label() for line in axes.lines] == ["e2e", "checkpoint", "glcan:4"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([74.5, 85, 95])


def test_without_validation_data_the_plot_says_that_it_shows_the_train_loss(comparison):
    for method in comparison["methods"]:
        method["curve"] |= {"name": "train_loss", "unit": ""}
    axes = plots.over_epochs(comparison).axes[0]
    assert axes.get_ylabel() == "train loss"
    assert "training data" in axes.get_title()


def test_costs_are_ratios_to_end_to_end_and_absolute_without_it(comparison):
    left, right = plots.against_cost(comparison).axes
    assert "/ end-to-end" in left.get_xlabel()
    assert "/ end-to-end" in right.get_xlabel()
    for method in comparison["methods"]:
        method["vs_e2e"] = None
    left, right = plots.against_cost(comparison).axes
    assert left.get_xlabel().endswith("(MiB)")
    assert right.get_xlabel().endswith("(ms)")


def test_more_methods_than_colours_and_one_seed(comparison):
    comparison["seeds"] = [0]
    comparison["methods"] *= 4
    for method in comparison["methods"]:
        method["metric"]["std"] = None
    assert len(plots.against_cost(comparison).axes) == 2


@pytest.mark.parametrize(
    ("means", "unit", "low", "high"),
    [
        ([0.99, 0.99, 0.99], "fraction", 98.0, 100.2),
        ([0.90, 0.80, 0.70], "fraction", 60.0, 95.0),
        ([30.0, 31.0, 32.0], "dB", 29.0, 33.0),
        ([0.0, 0.0, 0.0], "fraction", -1.0, 1.0),
    ],
)
def test_the_axis_of_the_metric_holds_all_values_with_some_room(comparison, means, unit, low, high):
    for method, mean in zip(comparison["methods"], means, strict=True):
        method["metric"] |= {"mean": mean, "std": None, "unit": unit}
    bottom, top = plots.against_cost(comparison).axes[0].get_ylim()
    scale = 100 if unit == "fraction" else 1
    assert low <= bottom < scale * min(means)
    assert scale * max(means) < top <= high
