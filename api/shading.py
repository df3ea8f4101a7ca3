"""Text with tokens shaded by how strongly a latent is on: in a terminal, in a notebook, and plain."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

SHADES = ("#4a3608", "#6b4a06", "#8f6000", "#b87a00")
"""Backgrounds of active tokens, from weak to strong; the text on them is near white."""


@dataclass(frozen=True)
class ShadedText:
    """Tokens and, for each, a latent's activation as a share of the largest one shown with it."""

    tokens: Sequence[str]
    shares: Sequence[float]
    title: str = ""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.shares), "a share a token"

    def __str__(self) -> str:
        """Plain: active runs stand in ⟦ ⟧."""
        parts, was_active = [f"{self.title}: " if self.title else ""], False
        for token, share in zip(self.tokens, self.shares, strict=True):
            parts.append(("" if (share > 0) == was_active else "⟦" if share > 0 else "⟧") + token)
            was_active = share > 0
        return "".join(parts) + ("⟧" if was_active else "")

    def rich(self) -> "Text":
        from rich.text import Text

        text = Text()
        if self.title:
            text.append(f"{self.title}: ", style="bold")
        for token, share in zip(self.tokens, self.shares, strict=True):
            text.append(token, style=f"#f4f4f0 on {_shade(share)}" if share > 0 else "")
        return text

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield self.rich() if console.is_terminal else Text(str(self))

    def _repr_html_(self) -> str:
        spans = [
            f'<span style="color:#f4f4f0;background:{_shade(share)}" title="{share:.2f}">{html.escape(token)}</span>'
            if share > 0
            else html.escape(token)
            for token, share in zip(self.tokens, self.shares, strict=True)
        ]
        title = f"<b>{html.escape(self.title)}:</b> " if self.title else ""
        return f'<div style="font-family:monospace;white-space:pre-wrap">{title}{"".join(spans)}</div>'


def _shade(share: float) -> str:
    return SHADES[min(3, int(share * 4))]
