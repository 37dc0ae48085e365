"""The look that pages, figures and the terminal share: colours, in light and dark, and matplotlib's settings.

Credit is drawn from orange (it lowers the value of the state) over the background (0) to blue (it raises it),
which people with any common colour blindness tell apart; the sign is always written beside it.
"""

import math
from contextlib import AbstractContextManager

Rgb = tuple[int, int, int]

# sRGB at the largest |r|, on a light page and on a dark one.
TINTS: dict[str, tuple[Rgb, Rgb]] = {
  "positive": ((107, 174, 214), (38, 102, 152)),
  "negative": ((244, 148, 84), (158, 74, 20)),
  "unknown": ((236, 236, 236), (58, 58, 64)),
}

INK, SOFT, FAINT, LINE, PAGE, WRONG = "#1b1b1f", "#5c5c66", "#9a9aa2", "#e2e2e8", "#ffffff", "#b3261e"
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")  # Okabe and Ito
RUN_DASHES = ("-", "--", ":", "-.")

# The custom properties of the style sheet: name -> colour on a light and on a dark page.
PROPERTIES = {
  "ink": (INK, "#ececf0"),
  "soft": (SOFT, "#a9a9b4"),
  "faint": (FAINT, "#74747e"),
  "line": (LINE, "#34343c"),
  "page": (PAGE, "#17171a"),
  "wrong": (WRONG, "#ff8a80"),
  "run-0": (RUN_COLORS[0], "#4aa8e0"),
  "run-1": (RUN_COLORS[1], "#ff8a3d"),
  "run-2": (RUN_COLORS[2], "#2cc99b"),
  "run-3": (RUN_COLORS[3], "#e39ac3"),
  "run-4": (RUN_COLORS[4], "#f0b73a"),
  "run-5": (RUN_COLORS[5], "#7cc7f0"),
  "run-6": (RUN_COLORS[6], "#d8d8de"),
}
# Colours of figures -> the property that takes their place in a page.
OF_FIGURES = {light.lower(): name for name, (light, _) in PROPERTIES.items()} | {
  "#000000": "ink",
  "#45454d": "soft",
  "#7a7a83": "faint",
  "#ececf0": "line",
  "#d2d2d8": "line",
}

_MATPLOTLIB = {
  "svg.fonttype": "none",
  "svg.hashsalt": "rredcot_jax",
  "font.size": 8,
  "text.color": INK,
  "axes.edgecolor": FAINT,
  "axes.labelcolor": "#45454d",
  "axes.titlesize": 8.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#ececf0",
  "grid.linewidth": 0.7,
  "xtick.color": FAINT,
  "ytick.color": FAINT,
  "xtick.labelcolor": "#45454d",
  "ytick.labelcolor": "#45454d",
}


def context() -> AbstractContextManager[None]:
  """Our matplotlib settings whatever the reader's matplotlibrc says, so that a figure is the same bytes everywhere."""
  import matplotlib.style

  return matplotlib.style.context(["default", _MATPLOTLIB])


def weight(reward: float, scale: float) -> float:
  """How much of the end colour r_k gets: |r| / scale, in [0, 1]; 0 for NaN and where scale is 0."""
  return min(abs(reward) / scale, 1.0) if scale > 0 and math.isfinite(reward) else 0.0


def tint(reward: float, scale: float) -> Rgb:
  """sRGB background for r_k: white at 0, blue at +scale, orange at -scale, linear between; grey for NaN."""
  if not math.isfinite(reward):
    return TINTS["unknown"][0]
  end, share = TINTS["positive" if reward > 0 else "negative"][0], weight(reward, scale)
  red, green, blue = (round(255 + share * (channel - 255)) for channel in end)
  return red, green, blue


def hexadecimal(color: Rgb) -> str:
  """(107, 174, 214) -> "#6baed6"."""
  return "#{:02x}{:02x}{:02x}".format(*color)
