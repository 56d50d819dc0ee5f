"""A recipe's data in three parts that share no row."""

from __future__ import annotations

import pytest

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.data.row_checks import part_of
from tvac_plugin.starter.division import divide

SPLITS = {
    None: ("train[:80%]", "train[80%:90%]", "train[90%:]"),
    "train": ("train[:80%]", "train[80%:90%]", "train[90%:]"),
    "train[:1%]": ("train[:1%]", "train[1%:2%]", "train[2%:3%]"),
    "train[:20%]": ("train[:20%]", "train[20%:22%]", "train[22%:24%]"),
    "train[10%:]": ("train[10%:82%]", "train[82%:91%]", "train[91%:]"),
    "train[:95%]": ("train[:77%]", "train[77%:86%]", "train[86%:95%]"),
    "train[:500]": ("train[0:400]", "train[400:450]", "train[450:500]"),
    "train[100:200]": ("train[100:180]", "train[180:190]", "train[190:200]"),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("with_task", [True, False])
def test_data_that_cannot_be_read_are_divided_by_what_the_split_says(split, with_task):
    found = divide({"path": "someone/rows", "split": split}, where="datasets[0]", with_task=with_task)
    if with_task:
        assert found[:3] == SPLITS[split]
    parts = [part_of(part, 1000) for part in found[:3] if part]
    assert len(parts) == 2 + with_task
    assert all(part and not part & other for i, part in enumerate(parts) for other in parts[:i])
    assert parts[0] <= part_of(split or "train", 1000)


@pytest.mark.parametrize("split", ["train[99%:]", "train+test", "train[100:]", "train[-5:]"])
def test_a_split_that_cannot_be_divided_is_refused(split):
    with pytest.raises(UserError, match="cannot be divided further. Write it as `train`"):
        divide({"path": "someone/rows", "split": split}, where="datasets[0]", with_task=True)
