"""Sizes in bytes: GB and GiB told apart, everything else refused with the remedy."""

from __future__ import annotations

import pytest

from glcan.errors import ConfigError
from glcan.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        (" 7.5 gib ", int(7.5 * 2**30)),
        ("512MiB", 2**29),
        ("512 MB", 512_000_000),
        (".5KiB", 512),
        ("100B", 100),
        ("1TiB", 2**40),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8", "no unit"),
        ("8G", "'G', which is unknown"),
        ("8 gigs", "'gigs', which is unknown"),
        ("lots", "no number"),
        ("", "no number"),
        ("-1GiB", "not positive"),
        ("0GB", "not positive"),
        (0, "not positive"),
        ("8GiB of it", "no number"),
    ],
)
def test_what_is_no_size_is_refused(text: str | int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_bytes(text)
    assert "GiB" in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023 * 2**20, "0.999 GiB"),
        (2**20, "1 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**42, "4 TiB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text
