"""python -m benchmarks.agreement SHARD.tar: how far the 4-bit kernels are from the same weights in
float32.

Both decoders read the same captioned pictures, caption and all; at each of the caption's tokens
their likeliest next token and their distributions are compared. The float32 model has the file's
weights unpacked (and rounded to bfloat16, as they are kept for training).
"""

import argparse

import numpy as np
import torch

from minigpt4.config import get_model
from minigpt4.data.examples import read_shards
from minigpt4.data.outputs import print_json
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.native import NativeDecoder
from minigpt4.engine.sampling import log_softmax
from minigpt4.engine.scheduler import Chunk, Request, RequestState, Rows, Sequence, rows_of
from minigpt4.engine.stream import Stream
from minigpt4.engine.torch_decoder import TorchDecoder
from minigpt4.model import image
from minigpt4.model.prompt import ImageRef, encode_training
from minigpt4.weights.load import find_weights, load_model


def main() -> None:
    """Compare and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.agreement")
    parser.add_argument("shard")
    parser.add_argument("--limit", type=int, default=200, help="pictures")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    config = get_model("nano")
    files = find_weights(config)
    small = load_model(config, files, quantize="int4")
    full = load_model(config, files, quantize="none", llm_dtype=torch.float32)
    blocks = 16
    native = NativeDecoder(small.llm, config.context, blocks, torch.get_num_threads())
    reference = TorchDecoder(full.llm, blocks)
    agreed = tokens = 0
    divergence = 0.0
    for example in read_shards(options.shard)[: options.limit]:
        picture = image.load(example.read())
        ref = ImageRef(picture.key)
        prompt = encode_training(
            (ref, config.short_instruction),
            example.captions[0],
            config.template,
            small.tokenizer,
            config.image_tokens,
            60,
        )
        state = RequestState(Request(prompt, {}), Stream(lambda _: 0, 0), 1)
        state.embeds[picture.key] = small.encode_pictures([picture.rgb])[0].embeds
        sequence = Sequence(prompt.ids, prompt.keys, list(range(blocks)))
        sequence.computed = 0
        rows = rows_of([Chunk(state, sequence, len(prompt))], config.llm_hidden_size)
        assert len(prompt) <= blocks * BLOCK_SIZE
        wanted = np.flatnonzero(prompt.loss_mask) - 1  # each predicts the token after it
        rows = Rows(**{**vars(rows), "wanted": wanted.astype(np.int32)})
        ours, theirs = log_softmax(native.forward(rows)), log_softmax(reference.forward(rows))
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(wanted)
        divergence += float((np.exp(theirs) * (theirs - ours)).sum())
    figures = {
        "tokens": tokens,
        "same_likeliest_token": round(agreed / tokens, 4),
        "kl_divergence_nats_a_token": round(divergence / tokens, 5),
    }
    print_json(figures, options.json)


if __name__ == "__main__":
    main()
