"""How a method is written: what is read, what is refused, and that it is written as it is read."""

import pytest

from glcan.errors import ConfigError, UnknownName
from glcan.strategies import Method, create, family_of, names, parse_method, parse_methods


@pytest.mark.parametrize(
    ("text", "method", "written"),
    [
        ("e2e", Method("e2e"), "e2e"),
        ("checkpoint", Method("checkpoint"), "checkpoint"),
        ("checkpoint-sqrt", Method("checkpoint-sqrt"), "checkpoint-sqrt"),
        ("selective", Method("selective"), "selective"),
        ("glcan", Method("glcan"), "glcan"),  # cuts or a budget decide the number
        ("glcan:4", Method("glcan", 4), "glcan:4"),
        (" glcan : 016 ", Method("glcan", 16), "glcan:16"),
        ("glcan:1", Method("glcan", 1), "glcan:1"),
        ("dgl:04 + finish", Method("dgl", 4, finish=0.1), "dgl:4+finish:0.1"),
        ("dgl:4+start", Method("dgl", 4, start=0.3), "dgl:4+start:0.3"),
        ("dgl:4+finish:0.2+start", Method("dgl", 4, start=0.3, finish=0.2), "dgl:4+start:0.3+finish:0.2"),
        ("glcan:4+freeze", Method("glcan", 4, freeze=0.5), "glcan:4+freeze:0.5"),
        ("glcan:4+freeze:1", Method("glcan", 4), "glcan:4"),
        ("e2e + accumulate:04", Method("e2e", accumulate=4), "e2e+accumulate:4"),
        ("e2e+accumulate:1", Method("e2e"), "e2e"),
        ("glcan:4+accumulate:2+start:0.25", Method("glcan", 4, 2, start=0.25), "glcan:4+start:0.25+accumulate:2"),
        ("my.rules:Small:4", Method("my.rules:Small", 4), "my.rules:Small:4"),
        ("my.rules:Small", Method("my.rules:Small"), "my.rules:Small"),
        ("my_rules:Own:4+accumulate:2", Method("my_rules:Own", 4, 2), "my_rules:Own:4+accumulate:2"),
        ("manpp:16", Method("manpp", 16), "manpp:16"),
        ("selective+accumulate:2", Method("selective", accumulate=2), "selective+accumulate:2"),
    ],
)
def test_a_method_is_written_as_it_is_read(text, method, written):
    assert parse_method(text) == method
    assert str(method) == written
    assert parse_method(written) == method
    assert parse_method(method) is method


@pytest.mark.parametrize(
    ("text", "near"),
    [("glcann:4", "'glcan'"), ("e2", "'e2e'"), ("checkpoint_sqrt", "checkpoint"), ("selectiv", "selective")],
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e2e:4", "Write 'e2e' alone"),
        ("selective:4", "Write 'selective' alone"),
        ("checkpoint+finish", "has a finish, and 'checkpoint' trains the whole model"),
        ("e2e+start", "has a start, and 'e2e' trains the whole model"),
        ("selective+freeze", "has a freeze, and 'selective' trains the whole model"),
        ("glcan:4+strat", r"has '\+strat'; .*'\+start'"),
        ("glcan:4+start+start", "twice"),
        ("glcan:4+start:0", "a share of the steps lies in"),
        ("glcan:4+start:nan", "a share of the steps lies in"),
        ("glcan:4+finish:half", "a share of the steps lies in"),
        ("glcan:4+freeze:1.5", r"in \(0, 1\]"),
        ("glcan:4+start:0.6+freeze:0.5", "Lower the start"),
        ("e2e+accumulate", "'' parts, which is no positive integer"),
        ("e2e+accumulate:0", "no positive integer"),
        ("glcan:4+accumulate:2+accumulate:2", r"'\+accumulate:2' twice"),
        ("glcan:4+", r"has '\+'; there may be"),
        ("glcan:4+start:0.5+finish:0.6", "the first block has only 0.4 of them"),
        ("my.rules:Own:x", "has 'x' blocks.*'my.rules:Own:4'"),
    ],
)
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_method(text)


def test_methods_are_kept_in_order_and_named_once():
    assert [str(method) for method in parse_methods(["glcan:2", "e2e"])] == ["glcan:2", "e2e"]
    with pytest.raises(ConfigError, match="'glcan:2' is named more than once"):
        parse_methods(["glcan:2", "e2e", "glcan:02"])
    with pytest.raises(ConfigError, match="at least one method"):
        parse_methods([])


def test_folders_have_no_colon():
    assert parse_method("glcan:4+start:0.3").folder == "glcan-4+start-0.3"
    assert ":" not in parse_method("pkg.rules:Own:4+accumulate:2").folder


def test_the_core_is_the_method_without_parts_and_phases():
    method = parse_method("glcan:4+accumulate:2")
    assert (method.base, method.number, method.core, method.accumulate) == ("glcan", 4, "glcan:4", 2)
    assert not method.phased
    assert parse_method("pkg.rules:Own:4+accumulate:2").core == "pkg.rules:Own:4"
    assert all(parse_method(f"glcan:4+{phase}").phased for phase in ("start", "freeze", "finish"))
    families = [family_of(name) for name in ("e2e", "selective", "glcan", "my.rules:Own")]
    assert families == ["exact", "sampled", "local", "local"]


@pytest.mark.parametrize("name", names())
def test_every_name_makes_a_strategy(name):
    local = family_of(name) == "local"
    strategy = create(f"{name}:3" if local else name, "classification")
    assert strategy.name == name
    assert strategy.number == (3 if local else None)
    assert strategy.summary


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("e2e", {"budget": 1}, ConfigError, "'e2e' has no options, but got budget"),
        ("glcan:4", {"budjet": 1}, UnknownName, "option of 'glcan' 'budjet'.*'budget'"),
        ("glcan:4", {"budget": "much"}, ConfigError, "glcan.budget is 'much'; it must be a float"),
        ("selective", {"share": 1.5}, ConfigError, r"selective.share is 1.5; it must lie in \(0, 1\]"),
        ("nowhere:Rule:4", {}, ConfigError, "no module 'nowhere' for the rule"),
    ],
)
def test_options_are_checked(method, options, error, message):
    with pytest.raises(error, match=message):
        create(method, "classification", options)
