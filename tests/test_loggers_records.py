import io

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.loggers.records import crc32c, record


def test_the_known_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C in every catalogue
    assert crc32c(b"") == 0


@given(st.binary(max_size=40) | st.binary(min_size=505, max_size=520) | st.binary(min_size=1020, max_size=3000))
def test_the_bytes_are_those_of_tensorboards_own_writer(data: bytes) -> None:
    theirs = io.BytesIO()
    RecordWriter(theirs).write(data)
    assert record(data) == theirs.getvalue()
