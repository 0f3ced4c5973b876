"""Data parallel, fully sharded and tensor parallel training: started here, checked in distributed.py."""

import pytest
import torch.multiprocessing as mp

from tests.st3_torch import distributed


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_do_what_one_does(world, tmp_path):
    names = [name for count, name in distributed.CHECKS if count == world]
    mp.spawn(distributed.run, (world, str(tmp_path / "store"), names), nprocs=world)
