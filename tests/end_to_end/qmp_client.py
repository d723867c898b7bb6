"""What a management tool does with qemu.qmp: negotiate (out-of-band included), start jobs, listen, cope with errors.

Usage: qmp_client.py SOCKET FOLDER. Prints one line per step that went well and exits with 0; any surprise is an exception.
"""

import asyncio
import sys

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    Runstate,
    StateError,
)

SOCKET, FOLDER = sys.argv[1:3]
DEADLINE_SECONDS = 120


async def add(client, name, **more):
    await client.execute(
        "blockdev-add",
        {"driver": "file", "node-name": name, "filename": f"{FOLDER}/{name}.raw", **more},
    )


async def refused(client, text, command, arguments=None):
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error_class and text in str(error), f"{error.error_class}: {error}"
        return error
    raise AssertionError(f"{command} was not refused")


async def negotiates():
    client = QMPClient("first")
    await client.connect(SOCKET)
    assert client.runstate == Runstate.RUNNING
    assert client.greeting.QMP.capabilities == ["oob"]
    names = {entry["name"] for entry in await client.execute("query-commands")}
    assert {"blockdev-backup", "query-qmp-schema"} <= names
    # The client enables oob whenever it is offered; no command takes part in it.
    message = client.make_execute_msg("query-jobs", oob=True)
    try:
        await client.execute_msg(message)
        raise AssertionError("no command is out-of-band")
    except ExecuteError as error:
        assert "does not support OOB" in str(error)
    print("negotiated")
    return client


async def backs_up(client):
    for name in ("s", "t"):
        await add(client, name)
    with client.listener(("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED")) as events:
        await client.execute(
            "blockdev-backup",
            {"job-id": "b", "device": "s", "target": "t", "sync": "full", "auto-dismiss": False},
        )
        seen = []
        async for event in events:
            data = event["data"]
            seen.append(data.get("status", event["event"]))
            if seen[-1] == "concluded":
                break
    order = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded"]
    assert [status for status in seen if status in order] == order, seen
    (job,) = await client.execute("query-jobs")
    assert job["current-progress"] == job["total-progress"] > 0 and "error" not in job, job
    await client.execute("job-dismiss", {"id": "b"})
    print("backup done")


async def mirrors(client):
    ready, ended = EventListener("BLOCK_JOB_READY"), EventListener("BLOCK_JOB_COMPLETED")
    for listener in (ready, ended):
        client.register_listener(listener)
    await client.execute(
        "blockdev-mirror", {"job-id": "m", "device": "s", "target": "t", "sync": "full"}
    )
    assert (await ready.get())["data"]["device"] == "m"
    # Many requests at once are answered in their order.
    answers = await asyncio.gather(*(client.execute("query-block-jobs") for _ in range(50)))
    assert all(jobs[0]["ready"] for jobs in answers)
    await client.execute("job-complete", {"id": "m"})
    assert "error" not in (await ended.get())["data"]
    for listener in (ready, ended):
        client.remove_listener(listener)
    print("mirror done")


async def copes_with_errors(client):
    error = await refused(client, "not found", "block-job-cancel", {"device": "nobody"})
    assert error.error_class == "DeviceNotActive"
    error = await refused(client, "has not been found", "no-such-command")
    assert error.error_class == "CommandNotFound"
    await refused(client, "Parameter 'id' is missing", "job-pause")
    await refused(client, "No such file or directory", "blockdev-add", {
        "driver": "file", "node-name": "x", "filename": f"{FOLDER}/none.raw"})
    print("errors understood")


async def leaves_and_comes_back(client):
    await client.execute(
        "blockdev-backup",
        {"job-id": "slow", "device": "s", "target": "t", "sync": "full", "speed": 1},
    )
    await client.disconnect()
    assert client.runstate == Runstate.IDLE
    await client.connect(SOCKET)
    (job,) = await client.execute("query-jobs")
    assert job["id"] == "slow" and job["status"] == "running", job
    second = QMPClient("second")
    await second.connect(SOCKET)
    with second.listener("BLOCK_JOB_CANCELLED") as events:
        await client.execute("job-cancel", {"id": "slow"})
        await events.get()
    print("reconnected")
    return second


async def sees_the_end(client, second):
    await client.execute("quit")
    while True:
        try:
            await second.execute("query-jobs")
        except ExecuteError:
            # The daemon is ending.
            continue
        except (ExecInterruptedError, StateError):
            break
    for one in (client, second):
        # The end may come as an end or, to one who was still talking, as a reset.
        try:
            await one.disconnect()
        except (EOFError, ConnectionError):
            pass
    print("ended")


async def main():
    client = await negotiates()
    await backs_up(client)
    await mirrors(client)
    await copes_with_errors(client)
    second = await leaves_and_comes_back(client)
    await sees_the_end(client, second)


asyncio.run(asyncio.wait_for(main(), DEADLINE_SECONDS))
