"""Random requests through libnbd, many at once on several connections, against a model: nbd_client.py URI FIRST:END."""
import os
import random
import sys

import nbd

SIZE = 16 << 20


def run(uri, seed, requests=300, connections=3):
    rand = random.Random(seed)
    handles = []
    for _ in range(connections):
        handle = nbd.NBD()
        # Certificates that a URI names.
        handle.set_uri_allow_local_file(True)
        handle.add_meta_context("base:allocation")
        if rand.random() < 0.3:
            handle.set_request_structured_replies(False)
        handle.connect_uri(uri)
        handles.append(handle)
    model = bytearray(handles[0].pread(SIZE, 0))
    waiting = []

    def wait_all():
        for handle in handles:
            while handle.aio_in_flight() > 0:
                handle.poll(-1)
        for handle, cookie, start, end, buffer, expected in waiting:
            assert handle.aio_command_completed(cookie)
            if expected is not None:
                assert buffer.to_bytearray() == expected, ("read", start, end)
        waiting.clear()

    for _ in range(requests):
        handle = rand.choice(handles)
        lengths = [1, 511, 512, 4096, 5000, 65536, 70000, 1 << 20, 3 << 20, rand.randrange(1, 1 << 21)]
        length = rand.choice(lengths)
        offset = rand.randrange(0, SIZE - length)
        if rand.random() < 0.5:
            offset -= offset % 4096
        end = offset + length
        kind = rand.choice("rrwwwzztfsc")
        reads = kind in "rsc"
        # What overlaps and is not only read has no order.
        if len(waiting) >= 24 or any(
            start < end and offset < stop and not (reads and not_changed)
            for _, _, start, stop, _, not_changed in waiting
        ):
            wait_all()
        if kind == "r":
            buffer = nbd.Buffer(length)
            cookie = handle.aio_pread(buffer, offset)
            waiting.append((handle, cookie, offset, end, buffer, bytes(model[offset:end])))
        elif kind == "w":
            data = (os.urandom(16) * (length // 16 + 1))[:length]
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            cookie = handle.aio_pwrite(buffer, offset, flags=rand.choice([0, 0, nbd.CMD_FLAG_FUA]))
            model[offset:end] = data
            waiting.append((handle, cookie, offset, end, buffer, None))
        elif kind == "z":
            flags = rand.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA])
            cookie = handle.aio_zero(length, offset, flags=flags)
            model[offset:end] = bytes(length)
            waiting.append((handle, cookie, offset, end, None, None))
        elif kind == "t":
            wait_all()
            handle.trim(length, offset)
            # What it reads as afterwards is not said.
            model[offset:end] = handle.pread(length, offset)
        elif kind == "f":
            handle.flush()
        elif kind == "c":
            handle.cache(length, offset)
        elif handle.can_meta_context("base:allocation"):
            wait_all()
            told = []
            handle.block_status(length, offset, lambda _, __, entries, ___: told.extend(entries) or 0)
            place = offset
            for extent, flags in zip(told[::2], told[1::2]):
                if flags & 2:
                    assert not any(model[place : min(place + extent, end)]), ("zero", place, extent)
                place += extent
            assert place > offset
    wait_all()
    assert handles[0].pread(SIZE, 0) == model, "the disk is another"
    for handle in handles:
        handle.shutdown()


if __name__ == "__main__":
    first, last = map(int, sys.argv[2].split(":"))
    for number in range(first, last):
        try:
            run(sys.argv[1], number)
        except BaseException:
            print("seed", number, file=sys.stderr)
            raise
    print("ok")
