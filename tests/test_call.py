"""A word from one rank to the others: heard within a second, of this call only, looked for at most once a second."""

import time

from ranks import over_ranks

from trainer.distributed.call import Call


def calls(rank, world, name):
    import torch.distributed as dist

    here, other, unnamed = Call(name), Call(f"another than {name}"), Call()
    found = [here.is_heard()]
    dist.barrier()
    if rank == 1:
        here.call()
        unnamed.call()
    dist.barrier()
    found.append(here.is_heard())  # it was asked a moment ago
    time.sleep(1.05)
    found += [here.is_heard(), other.is_heard(), unnamed.is_heard()]
    return found


def test_what_one_rank_calls_all_hear_when_they_next_look() -> None:
    for found in over_ranks(calls, "a"):
        assert found == [False, False, True, False, False]


def test_without_a_process_group_nobody_calls_and_nobody_hears() -> None:
    alone = Call("a")
    alone.call()
    assert not alone.is_heard()
