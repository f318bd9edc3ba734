"""Every bad input and every fault that the command must survive, as data.

A case is a generator, which makes a good run bad, and what the user must see. tests/test_corpus.py
runs them all, and checks of each what no case needs to say.
"""

from tests.corpus import (
    arguments,
    between_checkpoints,
    distributed,
    folders,
    index_files,
    running,
    safetensors_files,
    torch_files,
    values,
)

CASES = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (
        *(safetensors_files, index_files, torch_files, distributed, values),
        *(between_checkpoints, folders, running, arguments),
    )
}
