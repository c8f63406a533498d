"""The server's options, for `app.py` and `minigpt4 serve`; Ray's ingress takes some of them."""

from minigpt4.options import (
    EMBEDDINGS_MB,
    Option,
    Parser,
    add_model_options,
    add_remote_llm_options,
    integer,
    number,
    one_of,
    secret,
    switch,
)

MAX_QUEUE = Option("max-queue", "Maximum number of waiting requests.", 32, integer(1, 10_000), "N")
MAX_RUNNING = Option(
    "max-running",
    "Maximum number of requests answered at once; with --llm-url, at each server.",
    32,
    integer(1, 10_000),
    "N",
)
MAX_UPLOAD = Option(
    "max-upload-mb", "Maximum size of a picture file, in MB.", 20, integer(1, 1000), "MB"
)
IMAGE_HOSTS = Option(
    "image-hosts",
    "Hosts from which the API may fetch pictures, separated by commas. By default none.",
    metavar="HOSTS",
)
IGNORE_TOOLS = Option(
    "ignore-tools",
    "Answer requests that offer tools as if they offered none, for clients that always do, such as "
    "Open WebUI. By default they are refused, since the model calls no functions.",
    False,
    switch,
)
API_KEY = Option("api-key", "Key that clients of the API must send.", read=secret, metavar="KEY")
SERVER = (
    Option(
        "host",
        "Address to listen on; 0.0.0.0 accepts connections from other machines.",
        "127.0.0.1",
        fallback="GRADIO_SERVER_NAME",
    ),
    Option("port", "Port to listen on.", 7860, integer(1, 65535), fallback="GRADIO_SERVER_PORT"),
    Option("share", "Publish the page through Gradio's relay.", False, switch),
    MAX_UPLOAD,
    MAX_QUEUE,
    MAX_RUNNING,
    Option(
        "kv-megabytes",
        "Memory for the key-value cache, in MB; at least what one conversation takes is used.",
        None,
        integer(1, 1_000_000),
        "MB",
    ),
    Option(
        "kv-bits",
        "Bits of the keys and values in that cache: 16 (the type that the model computes in), or 8 "
        "in about half the memory. auto: 8 for large models in 4 bits on a CPU, otherwise 16.",
        "auto",
        one_of("auto", "16", "8"),
        metavar="{auto,16,8}",
    ),
    EMBEDDINGS_MB,
    Option("auth", "User name and password for the page.", metavar="USER:PASSWORD"),
    API_KEY,
    IMAGE_HOSTS,
    IGNORE_TOOLS,
    Option(
        "cors-origins",
        "Origins of web pages whose scripts may use the API, such as https://chat.example.org, "
        "separated by commas; * for all. By default those of this machine.",
        metavar="ORIGINS",
    ),
    Option(
        "mcp",
        "Offer questions about pictures as a tool of the Model Context Protocol, at "
        "/gradio_api/mcp/.",
        False,
        switch,
    ),
    Option("root-path", "Path under which a proxy serves the page, such as /chat.", metavar="PATH"),
    Option(
        "shutdown-seconds",
        "Time that running answers have to finish after SIGTERM or Ctrl-C, in seconds.",
        25.0,
        number(0),
        "SECONDS",
    ),
    Option(
        "feedback",
        "Store likes and dislikes, with the conversations' texts, in this folder. By default the "
        "page has no such buttons.",
        metavar="FOLDER",
    ),
)


def add_options(parser: Parser) -> None:
    """The server's options."""
    add_model_options(parser, several=True)
    add_remote_llm_options(parser)
    parser.add(SERVER, "server")
