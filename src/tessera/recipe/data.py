"""[data]: which text, which tokenizer, and how it is cut into batches.

Paths are relative to the folder in which the command runs. The text is turned into token shards once, by
`tessera.data`.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, Strict

from tessera.recipe.schedule import Schedule
from tessera.recipe.section import Section

Strings = Annotated[tuple[str, ...], Field(min_length=1), Strict(False)]


class DataSection(Section):
    """The corpus, its tokenizer, the length of sequences and the size of batches."""

    source: str | Strings = Field(
        description='"python-stdlib" (the sources of the running Python), a file or folder, or a list of these.'
    )
    extensions: Strings = Field(
        (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet"),
        description="Ends of the file names that are read from a folder.",
    )
    text_field: str = Field(
        "text", min_length=1, description="Field or column that holds the text in JSONL and Parquet."
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="Path of a tokenizer.json; left out: trained on the corpus with model.vocab_size tokens.",
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="Folder for the trained tokenizer and the token shards; left out: data/ of the run.",
    )
    sequence_length: int = Field(ge=1, description="Tokens a sequence predicts (4096 in the report's main stage).")
    batch_size: Schedule = Field(
        description="Sequences in a step, rounded to a multiple of training.micro_batch_size in between."
    )
    validation_fraction: float = Field(0.02, gt=0, lt=1, description="Share of the documents that is held out.")
    cross_document_attention: bool = Field(
        True, description="Attend across the documents packed in a sequence, as in the report; false: masked."
    )
    fim_rate: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the documents rearranged to fill in the middle, prefix-suffix-middle.",
    )
    seed: int = Field(0, ge=0, description="Seed of the split, the shuffling and the middles.")
    num_workers: int = Field(0, ge=0, description="Processes that prepare the shards; 0: the process itself.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if "" in ((self.source,) if isinstance(self.source, str) else self.source):
            yield "source", 'an empty string names no text; give "python-stdlib", a file or a folder'
        for extension in self.extensions:
            if not extension.startswith(".") or len(extension) < 2:
                yield "extensions", f'"{extension}" must start with a dot, such as ".txt"'
