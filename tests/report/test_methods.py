import pytest

from glcan.errors import ConfigError, UnknownName
from glcan.report import Method, parse_method, parse_methods


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("e2e", Method("e2e", "e2e", 1)),
        ("checkpoint", Method("checkpoint", "checkpoint", 1)),
        ("checkpoint-sqrt", Method("checkpoint-sqrt", "checkpoint-sqrt", 1)),
        ("glcan:4", Method("glcan:4", "glcan", 4)),
        (" glcan : 016 ", Method("glcan:16", "glcan", 16)),
        ("glcan:1", Method("glcan:1", "glcan", 1)),
        ("dgl:04 + finish", Method("dgl:4+finish", "dgl", 4, finish=True)),
        ("dgl:4+start", Method("dgl:4+start", "dgl", 4, start=True)),
        ("dgl:4 +start +finish", Method("dgl:4+start+finish", "dgl", 4, start=True, finish=True)),
        ("dgl:4+finish+start", Method("dgl:4+start+finish", "dgl", 4, start=True, finish=True)),
    ],
)
def test_a_method_is_a_baseline_or_a_rule_with_its_blocks(text, method):
    assert parse_method(text) == method


@pytest.mark.parametrize(
    ("text", "near"), [("glcann:4", "'glcan'"), ("e2", "'e2e'"), ("checkpoint_sqrt", "checkpoint")]
)
def test_an_unknown_name_lists_near_ones(text, near):
    with pytest.raises(UnknownName, match=near):
        parse_method(text)


@pytest.mark.parametrize("text", ["", "4", ":4", "xyzzy"])
def test_a_hopeless_name_lists_all(text):
    with pytest.raises(UnknownName, match=r"e2e, checkpoint, checkpoint-sqrt, .*glcan"):
        parse_method(text)


@pytest.mark.parametrize("blocks", ["", "0", "-1", "four", "1.5", "4:4", "²"])
def test_blocks_must_be_a_positive_integer(blocks):
    with pytest.raises(ConfigError, match="no positive integer") as error:
        parse_method(f"glcan:{blocks}")
    assert "'glcan:4'" in str(error.value)


def test_a_rule_needs_its_blocks_and_a_baseline_takes_none():
    with pytest.raises(ConfigError, match="has no number of blocks"):
        parse_method("glcan")
    with pytest.raises(ConfigError, match="Write 'e2e' alone"):
        parse_method("e2e:4")
    with pytest.raises(ConfigError, match="gives a finish to 'checkpoint'"):
        parse_method("checkpoint+finish")
    with pytest.raises(ConfigError, match="gives a start to 'e2e'"):
        parse_method("e2e+start")


@pytest.mark.parametrize(("text", "match"), [("4+strat", r"has '\+strat'; .*'\+start'"), ("4+start+start", "twice")])
def test_what_follows_the_blocks_is_a_start_or_a_finish(text, match):
    with pytest.raises(ConfigError, match=match):
        parse_method(f"glcan:{text}")


def test_methods_are_kept_in_order_and_named_once():
    assert [method.name for method in parse_methods(["glcan:2", "e2e"])] == ["glcan:2", "e2e"]
    with pytest.raises(ConfigError, match="'glcan:2' is named more than once"):
        parse_methods(["glcan:2", "e2e", "glcan:02"])
    with pytest.raises(ConfigError, match="at least one method"):
        parse_methods([])


def test_folders_have_no_colon():
    assert parse_method("glcan:4").folder == "glcan-4"
