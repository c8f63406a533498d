"""ZeroGPU's simple path, with a stand-in for `spaces`: a real Space was not at hand."""

import json
from pathlib import Path

from tests.running import python

ROOT = Path(__file__).parent.parent
# In a program of its own: the process that forks must not have computed with many threads before.
PROGRAM = """
import argparse, asyncio, json, os, time
import spaces
from minigpt4 import config
from minigpt4.model import image
from minigpt4.remote import zerogpu
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.weights.load import load_model
from minigpt4 import start
from tests.parity_case import ParityCase
from pathlib import Path

case = ParityCase(Path("tests/parity/vicuna_qformer_a"))
start.open_model = lambda options: case.load()
options = argparse.Namespace(model="auto", quantize="auto", max_queue=2)
engine = zerogpu.open_engine(options)
said = {"model": options.model, "quantize": options.quantize, "here": zerogpu.is_here()}

def begin(count):
    conversation = Conversation.asking("What is this?", [image.load(case.image_paths[0])])
    return ask(engine, conversation, Sampling(temperature=0, max_new_tokens=count), logprobs=True)

async def read(answer):
    return "".join([piece async for piece in answer])

first = begin(8)
said["first"] = "".join(first)
said["logprobs"] = len(first.logprobs) == first.stats.tokens == 8
said["async"] = asyncio.run(read(begin(8)))
said["seconds"] = [*spaces.asked]
while engine.running or engine.waiting:  # the loans are on their way back
    time.sleep(0.01)
long, other = begin(1000), begin(1000)
next(iter(long))
said["running"] = engine.running in (1, 2)
try:
    begin(1)
except UserError as error:
    said["full"] = error.kind
long.close(), other.close()
said["drained"] = engine.drain(60)
totals = engine.totals
said["totals"] = [totals.requests, totals.tokens > 16, totals.prompt_tokens > 40]
said["endings"], said["errors"] = totals.endings, totals.errors
said["healthy after"] = engine.health()
try:
    begin(1)
except UserError as error:
    said["ending"] = error.kind

os.environ["NO_QUOTA"] = "1"
engine = zerogpu.open_engine(options)
try:
    "".join(begin(8))
except UserError as error:
    said["no quota"] = str(error)
del os.environ["NO_QUOTA"]
lend, engine._lend = engine._lend, None  # fails before anything is lent
try:
    "".join(begin(8))
except UserError as error:
    said["nothing lent"] = error.kind
engine._lend = lend
said["still running"] = engine.running + engine.waiting

plain = Engine(case.load())  # last: from here on there are threads that compute
engine = plain
said["plain"] = "".join(begin(8))
print(json.dumps(said))
"""


def test_answers_with_a_lent_gpu():
    variables = {
        "PYTHONPATH": f"{ROOT / 'tests' / 'zero_gpu'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "SPACES_ZERO_GPU": "true",
    }
    done = python("-c", PROGRAM, **variables)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["here"] and said["model"] == "vicuna-7b" and said["quantize"] == "none"
    assert said["first"] == said["async"] == said["plain"] != ""
    assert said["logprobs"] and said["seconds"] == [30, 30]
    assert said["running"] and said["drained"] and said["totals"] == [4, True, True]
    assert said["endings"] == {"length": 2, "closed": 2}
    assert said["errors"] == {"queue_full": 1, "ending": 1}  # as other engines count: each once
    assert said["nothing lent"] == "broken" and not said["still running"]
    assert said["ending"] == "ending" and said["full"] == "queue_full"
    assert not said["healthy after"]
    assert said["no quota"] == (
        "No GPU is available for this answer: You have exceeded your GPU quota"
    )
    assert "assert" not in done.stderr, done.stderr
