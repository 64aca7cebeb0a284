"""Values of numpy and pandas, which are refused: the message says what to pass instead, and that arrives."""

import numpy
import pandas
import pytest

from safedefer.errors import UnencodableArgument
from tests.zoo.exactly import carry_one


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *[
            (value, rf"\(numpy.{name}\) cannot be carried: .*; pass value.item\(\)")
            for value, name in [
                (numpy.bool(True), "bool"),  # noqa: FBT003  # it takes no other
                (numpy.int64(1), "int64"),
                (numpy.float64(1.5), "float64"),
                (numpy.str_("a"), "str_"),
                (numpy.bytes_(b"a"), "bytes_"),
                (numpy.datetime64("2026-01-01"), "datetime64"),
            ]
        ],
        (numpy.array([1, 2]), r"\(numpy.ndarray\) cannot be carried: .*; pass value.tolist\(\) if it is small; else pass an id"),
        (pandas.DataFrame({"a": [1]}), r"\(pandas.DataFrame\) cannot be carried: .*; pass an id, or add"),
        (pandas.Series([1]), r"\(pandas.Series\) cannot be carried: .*; pass an id, or add"),
        (pandas.Timestamp("2026-01-01"), r"\(pandas.Timestamp\) cannot be carried: .*; pass an id, register the type"),
    ],
)  # fmt: skip
def test_values_of_numpy_and_pandas_are_refused_with_what_to_pass_instead(value, message):
    with pytest.raises(UnencodableArgument, match=message):
        carry_one(value)


@pytest.mark.parametrize("value", [numpy.bool(True), numpy.int64(1), numpy.float64(1.5), numpy.str_("a")])  # noqa: FBT003
def test_what_is_advised_for_a_scalar_of_numpy_arrives(value):
    assert carry_one(value.item()) == value
