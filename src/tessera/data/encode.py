"""Documents to arrays of ids, in this process or in several, with the same result and in the same order.

The parent reads the corpus and hands out jobs of about a megabyte; what a job gives depends on nothing else, and
results are taken in the order of the jobs. At most a few jobs are under way, so memory stays bounded. Within one
process the tokenizer's own threads share the work; worker processes use one thread each.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessera.data.fill_in_middle import assembled
from tessera.data.tokenizer import Tokenizer
from tessera.recipe import UserError

JOB_CHARACTERS = 1 << 20
_JOBS_AHEAD = 2  # for each process: one at work, one waiting

Parts = tuple[str] | tuple[str, str, str]  # a document as it is, or its prefix, middle and suffix
Tokens = NDArray[np.uint32]


def encode_documents(documents: Iterable[Parts], tokenizer: Path, num_workers: int) -> Iterator[Tokens]:
    """The ids of each document with end of text behind them, in order; three parts become prefix-suffix-middle.

    `tokenizer` is the path of its file, which workers load. Raises UserError if a worker process dies.
    """
    jobs = _jobs(documents)
    if num_workers == 0:
        for job in jobs:
            yield from _encode(tokenizer, job)
        return
    # spawn: a fork would inherit locks of the tokenizer's and torch's threads in whatever state they are
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _one_thread)
    try:
        under_way: deque[Future[list[Tokens]]] = deque()
        for job in jobs:
            under_way.append(pool.submit(_encode, tokenizer, job))
            if len(under_way) >= _JOBS_AHEAD * num_workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"data.num_workers = {num_workers}: a worker process ended early (out of memory?, or a script without "
            'the guard `if __name__ == "__main__":`); set data.num_workers = 0'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(documents: Iterable[Parts]) -> Iterator[list[Parts]]:
    job: list[Parts] = []
    characters = 0
    for parts in documents:
        job.append(parts)
        characters += sum(map(len, parts))
        if characters >= JOB_CHARACTERS:
            yield job
            job, characters = [], 0
    if job:
        yield job


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library has no other switch


@lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def _encode(path: Path, documents: list[Parts]) -> list[Tokens]:
    tokenizer = _load(path)
    encoded = iter(tokenizer.encode_batch([part for parts in documents for part in parts]))
    end_of_text = np.array([tokenizer.end_of_text], dtype=np.uint32)
    done = []
    for parts in documents:
        ids = [next(encoded) for _ in parts]
        if len(ids) == 3:
            prefix, middle, suffix = ids
            markers = tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end
            ids = assembled(prefix, middle, suffix, *markers)
        done.append(np.concatenate([*ids, end_of_text]))
    return done
