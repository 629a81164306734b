"""`AttributionVisualizer`: the dashboard of Captum Insights, for every captum; and its kin."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, cast

from captum_attn._checks import flag, whole
from captum_attn.errors import AttnError, MissingExtraError
from captum_attn.insights.detected import DetectionSession
from captum_attn.insights.hosts import KnownHosts, checked_hosts
from captum_attn.insights.session import Session
from captum_attn.insights.tab import Tab
from captum_attn.insights.uploads import MAX_BYTES
from captum_attn.insights.writing import WritingSession

__all__ = ["AttributionVisualizer", "DetectionVisualizer", "GenerationVisualizer", "serve"]

VISITORS = 50  # whose fields Gradio remembers; the page sends all of them with every question
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"


class Served:
    """A tab that can be served as a page of its own."""

    _page: Any = None

    def serve(
        self,
        blocking: bool = False,
        debug: bool = False,
        port: int | None = None,
        bind_all: bool = False,
        hosts: Sequence[str] = (),
    ) -> int:
        """Serves the page until the program ends, or `close` is called.

        Args:
            blocking (bool): wait until the server is stopped (Ctrl-C). Default: False.
            debug (bool): print the server's log. Default: False.
            port (int, optional): Default: a free one.
            bind_all (bool): listen to other computers, too. There is no password: whoever reaches
                the port can use the models. Default: False, this computer only.
            hosts (sequence of str): further names by which browsers may ask for the page, such as
                that of a proxy in front of it. Default: this computer's own.

        Returns:
            int: the port.

        Raises:
            AttnError: where the port is in use.
            MissingExtraError: without the extra ``insights``.

        Examples::

            >>> port = visualizer.serve()
        """
        self.close()
        self._page, port = serve(
            {"": cast("Tab", self)}, blocking, debug, port, bind_all, hosts=hosts
        )
        return port

    def render(self, debug: bool = False) -> int:
        """Shows the page inside a notebook.

        Args:
            debug (bool): print the server's log. Default: False.

        Returns:
            int: the port that it is served on, on this computer only.

        Examples::

            >>> visualizer.render()
        """
        self.close()
        self._page, port = serve({"": cast("Tab", self)}, debug=debug, inline=True)
        return port

    def close(self) -> None:
        """Stops the server, if there is one."""
        if self._page is not None:
            self._page.close(verbose=False)
            self._page = None


class AttributionVisualizer(Served, Session):
    r"""A dashboard in the browser: examples, predictions, and two methods side by side.

    It takes what `captum.insights.AttributionVisualizer` takes.

    Args:
        models (Module, list of Module, or Mapping of str to Module): the models to choose from.
        classes (list of str): names of the model's outputs.
        features (BaseFeature or list of BaseFeature): one for each input of the model.
        dataset (iterable of Batch): the examples; it may be endless.
        score_func (callable, optional): from the model's output to the scores shown, such as a
            softmax. Default: the output itself.
        use_label_for_attr (bool): False for a model with one score. Default: True.
        methods (list of type or str, optional): classes of Captum attributions to choose from, or
            their names, "GAE". Default:
            captum_attn's, and two of Captum's where all inputs are of floats.
        num_examples (int): how many examples of the data set can be chosen. Default: 32.
        presets (Mapping, optional): values that options of methods start from, by their names,
            such as {"discard_self": True}. Default: the methods' own defaults.
        note (str): a sentence about the examples, shown above the prediction. Default: none.

    Raises:
        AttnError: one of its subclasses, for a data set that does not fit the features.

    Examples::

        >>> visualizer = AttributionVisualizer(
        ...     models=model, classes=names, features=[ImageFeature("Photo")],
        ...     dataset=[Batch(images, labels)], score_func=lambda out: out.softmax(-1),
        ... )
        >>> visualizer.serve(port=7860, blocking=True)
    """


class DetectionVisualizer(Served, DetectionSession):
    """A dashboard of a detector: its detections in a picture, and two maps of the chosen one.

    Args:
        models (Module, list of Module, or Mapping of str to Module): detectors of the DETR family,
            or whatever `captum_attn.detection.explain_detections` takes.
        feature (ImageFeature): the picture; its `input_transforms` are the normalisation.
        dataset (iterable of Batch): the examples.
        threshold (float): a detection's probability is above it; a visitor may change it. Default:
            0.5.
        activation, id2label: as for `explain_detections`.
        methods, num_examples, presets, note: as for `AttributionVisualizer`.

    Examples::

        >>> photo = ImageFeature("Photo", input_transforms=normalize)
        >>> DetectionVisualizer(detr, photo, [Batch(images)]).serve(blocking=True)
    """


class GenerationVisualizer(Served, WritingSession):
    """A dashboard of a causal language model: the next tokens of a prompt, and why one of them.

    Args:
        model (Module or callable): ids (1, n) -> logits (1, n, vocabulary), alone or as `.logits`;
            or without a `tokenizer` a callable that loads it, () -> (model, tokenizer), when the
            page is asked for the first time.
        tokenizer (optional): the model's, as transformers has them.
        prompts (sequence of str): examples.
        name (str): of the model. Default: "the model".
        methods, presets, note: as for `AttributionVisualizer`.

    Examples::

        >>> GenerationVisualizer(llm, tokenizer, ["The capital of France is"]).serve(blocking=True)
    """


def serve(
    sessions: Mapping[str, Tab],
    blocking: bool = False,
    debug: bool = False,
    port: int | None = None,
    bind_all: bool = False,
    inline: bool = False,
    hosts: Sequence[str] = (),
) -> tuple[Any, int]:
    """Serves a page with a tab for each session; see `AttributionVisualizer.serve`.

    Returns:
        tuple: the page, whose `close()` stops the server, and the port.
    """
    for name, value in {"blocking": blocking, "debug": debug, "bind_all": bind_all}.items():
        flag(name, value)
    known = {"hosts": checked_hosts(hosts), "everywhere": bind_all}
    pages = _pages()
    host = EVERYWHERE if bind_all else LOOPBACK
    port = checked_port(port, bind_all)
    page = pages.build_page(sessions)
    page.launch(
        server_name=host, server_port=port, share=False, inline=inline, prevent_thread_lock=True,
        quiet=not debug, debug=False, show_error=True, max_file_size=MAX_BYTES, ssr_mode=False,
        mcp_server=False, enable_monitoring=False, footer_links=[], theme=pages.theme(),
        css=pages.CSS, state_session_capacity=VISITORS,
        app_kwargs={"middleware": [(KnownHosts, (), known)]},
    )  # fmt: skip
    if not inline:
        print(f"Open http://{'localhost' if bind_all else host}:{port}/", flush=True)
    if blocking:
        page.block_thread()
    return page, port


def checked_port(port: int | None, bind_all: bool = False) -> int:
    """The port, or one that the system gives; refused if someone listens there already.

    Raises:
        AttnError: where the port cannot be used.
        MissingExtraError: without the extra ``insights``; raised here, before anything is shown.
    """
    _pages()
    port = None if port is None else whole("port", port, 0, 65535)
    host = EVERYWHERE if bind_all else LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do, so that a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except (OSError, OverflowError) as problem:
            said = getattr(problem, "strerror", None) or problem
            raise AttnError(
                f"port {port} on {host} cannot be used ({said}): give another one, or none for a "
                "free one"
            ) from problem
        return int(probe.getsockname()[1])


def _pages() -> ModuleType:
    """The module of the page, which alone imports Gradio."""
    try:
        from captum_attn.insights import page
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("captum_attn"):
            raise
        raise MissingExtraError(
            f"the dashboard needs {missing.name}, which is not installed: "
            'pip install "captum_attn[insights]"'
        ) from missing
    return page
