import math
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rredcot_jax.data.mathematics import equality, expressions, forms, latex, values
from rredcot_jax.data.mathematics.expressions import Node, UnreadableError, integer, read


def shown(node):
  """A tree as text: kind, name and value, then its arguments in brackets."""
  label = str(node.value) if node.kind == "number" else node.name or node.kind
  return label + (f"({', '.join(map(shown, node.args))})" if node.args else "")


# ---- Reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text, tree",
  [
    ("391", "391"),
    ("-3.50", "negative(7/2)"),
    ("\N{EN DASH}5", "negative(5)"),
    ("1,234.5", "2469/2"),
    (r"1\,000{,}000", "1000000"),
    ("1 000 000", "1000000"),
    ("1.000.000", "1000000"),
    ("(1,234)", "()(1, 234)"),
    (r"\{1,234\}", "set(1, 234)"),
    ("1, 234", ",(1, 234)"),
    ("4.5e33", str(45 * 10**32)),
    (r"4.5\times 10^{-3}", "9/2000"),
    (r"-4.5\cdot 10^3", "negative(4500)"),
    (r"45\cdot 10^2", "product(45, power(10, 2))"),
    (r"0.1\overline{6}", "1/6"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "3/2"),
    ("3\N{VULGAR FRACTION ONE HALF}", "7/2"),
    (r"-2\frac14", "negative(9/4)"),
    (r"\frac12", "quotient(1, 2)"),
    ("1/2x", "product(quotient(1, 2), x)"),
    ("a/b/c", "quotient(quotient(a, b), c)"),
    ("x\N{SUPERSCRIPT TWO}", "power(x, 2)"),
    ("2^10", "power(2, 10)"),
    ("-x^2", "negative(power(x, 2))"),
    ("-2x", "negative(product(2, x))"),
    (r"\sqrt[3]{2}\sqrt3", "product(root(2, 3), root(3, 2))"),
    ("\N{SQUARE ROOT}2", "root(2, 2)"),
    ("2ab", "product(2, a, b)"),
    ("x_{12}y_1'", "product(x_12, y_1')"),
    (r"\alpha\beta", "product(alpha, beta)"),
    ("e^{i\\pi}", "power(e, product(i, pi))"),
    (r"\exp(2x)", "power(e, product(2, x))"),
    (r"\sin 2x/3", "quotient(sin(product(2, x)), 3)"),
    (r"\sin x\cos x", "product(sin(x), cos(x))"),
    (r"\sin^2 x", "power(sin(x), 2)"),
    (r"\tan^{-1} x", "arctan(x)"),
    (r"\sin 30^\circ", "sin(degrees(30))"),
    (r"\log_2 8", "log(8, 2)"),
    (r"\log 8", "log(8, 10)"),
    (r"\log_e 8", "ln(8)"),
    ("|x-1|+|y|", "sum(abs(sum(x, negative(1))), abs(y))"),
    ("5!", "factorial(5)"),
    (r"\binom{5}{2}", "binomial(5, 2)"),
    (r"{5 \choose 2}", "binomial(5, 2)"),
    (r"3\pm\sqrt2", "plusminus(3, root(2, 2))"),
    ("f(x)=2", "=(f(x), 2)"),
    ("f^{-1}(x)=2", "=(f^-1(x), 2)"),
    ("P(3)", "P(3)"),
    ("1<x\\le 2", "< <=(1, x, 2)"),
    (r"x\in[0,1)", "in(x, [)(0, 1))"),
    (r"(-\infty,1)\cup\{2\}", "union(()(negative(infinity), 1), set(2))"),
    (r"\mathbb{R}\setminus\{0\}", "difference(reals, set(0))"),
    (r"\{x : x>1\}", ">(x, 1)"),
    (r"x=1\text{ or }x=2", "or(=(x, 1), =(x, 2))"),
    ("1, 2, and 3", "and(1, 2, 3)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "matrix(row(1, 2), row(3, 4))"),
    (r"\left[\begin{array}{c}1\\2\end{array}\right]", "matrix(row(1), row(2))"),
    ("3:4", "ratio(3, 4)"),
    ("1011_2", "1011_2"),
    (r"5\text{ cm}^2", "cm ^2(5)"),
    ("50\\%", "%(50)"),
    ("$5", "dollar(5)"),
    ("-\\$5", "dollar(negative(5))"),
    ("45\N{DEGREE SIGN}", "\N{DEGREE SIGN}(45)"),
    ("5 m/s^2", "m / s ^2(5)"),
    ("5 m", "m(5)"),
    ("5m", "product(5, m)"),
    ("16 m^2-8 m n", "sum(product(16, power(m, 2)), negative(product(8, m, n)))"),
    ("12 apples", "apples(12)"),
  ],
)
def test_texts_have_one_reading(text, tree):
  assert shown(read(text)) == tree


@pytest.mark.parametrize(
  "text",
  [
    "", " ", "2 3", "x2", "--5", "1+", "(1", "1)", "[1,2", "2^3^2", "5!!", "++", r"\frac{1}", r"\frac{}{2}",
    "a/b/c/d/e/f", "the answer", "abcd", "5 million", "5 less than 7", r"5\text{ squared}", "1;;2", r"\sum x",
    r"\lim x", r"\begin{cases}1\end{cases}", r"\begin{pmatrix}1&2\\3\end{pmatrix}", r"\begin{pmatrix}1",
    r"\unknown{2}", "1e999999", r"1\frac{4}{3}", "(" * 21 + "1" + ")" * 21, r"\ln" * 21 + "x", r"\sqrt" * 21 + "2",
    "x" + "+x" * 300, "\0", "?", "\\", "{1}{", "}", "&", "$", r"5\text{ cm}\text{ and }", "|x", "f(x", "1_{", "=",
    "x==2",
  ],
)  # fmt: skip
def test_other_texts_are_not_half_understood(text):
  with pytest.raises(UnreadableError):
    read(text)


def test_brackets_up_to_the_bound_are_read():
  depth = expressions.MAX_NESTING - 1  # The 1 inside counts as well.
  assert read("(" * depth + "1" + ")" * depth) == integer(1)
  assert shown(read("x" + "+x" * 255)).count("x") == 256


def test_a_letter_is_a_unit_unless_the_reference_has_it_for_a_symbol():
  assert shown(read("5 m")) == "m(5)"
  assert shown(read("5 m", symbols={"m"})) == "product(5, m)"
  assert shown(read("5 cm", symbols={"c", "m"})) == "product(5, c, m)"


def test_commas_divide_where_the_reference_is_a_list():
  assert shown(read("100,200")) == "100200"
  assert shown(read("100,200", separate=True)) == ",(100, 200)"


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=0, max_value=10**9))
def test_decimals_are_read_exactly(number):
  for text in (f"{number}", f"{number:,}", f"{number:,}".replace(",", "{,}"), f"{number:e}"):
    assert values.exact(read(text)) == Fraction(number)


def test_characters_become_latex():
  assert latex.to_latex(
    "\N{GREEK SMALL LETTER PI}\N{MULTIPLICATION SIGN}x\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ONE}"
  ) == (r"\pi \times x^{-1}")
  assert latex.to_latex("\N{FULLWIDTH DIGIT FOUR}\N{SUBSCRIPT TWO}") == "4_{2}"
  assert latex.to_latex(r"\left( 1 \right)^{\circ}").split() == ["(", "1", ")°"]


# ---- Values -------------------------------------------------------------------------------------------------------


def test_exact_values():
  assert values.exact(read(r"\frac{2^3\cdot 5-1}{3!}+\binom{5}{2}")) == Fraction(39, 6) + 10
  assert values.exact(read("2^{-2}")) == Fraction(1, 4)
  for text in (r"\sqrt4", "x", r"\pi", r"\frac{1}{0}", "0^{-1}", "2^{1/2}", r"9^{99999}", r"(9^{999})^{99}", "2000!"):
    assert values.exact(read(text)) is None


@pytest.mark.parametrize(
  "text, expected",
  [
    (r"\sqrt{2}", math.sqrt(2)),
    (r"\sqrt[3]{-8}", -2.0),
    (r"e^{i\pi}", -1.0),
    (r"i^2", -1.0),
    (r"\ln 2+\log_2 8+\log 100", math.log(2) + 5),
    (r"\sin 30^\circ", 0.5),
    (r"\sin\frac{\pi}{6}", 0.5),
    (r"\arctan 1", math.pi / 4),
    (r"\sec 0+\cot\frac{\pi}{4}+\cosh 0", 3.0),
    (r"|{-3}|+\lfloor 2.5\rfloor+\lceil 2.5\rceil", 8.0),
    (r"\binom{5}{2}\cdot 3!", 60.0),
    ("x^2+y", 4.5),
    (r"|3+4i|", 5.0),
  ],
)
def test_values_to_fifty_digits(text, expected):
  point = {"x": values.context().mpf(2), "y": values.context().mpf("0.5")}
  value = values.evaluate(read(text), point, values.Budget())
  assert complex(value) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
  "text",
  [
    r"\frac{1}{0}",
    r"\ln 0",
    "0^0",
    r"\infty",
    "9^{9^{9}}",
    r"e^{e^{e^{e^{e}}}}",
    r"\sin(10^{99})",
    "(10^9)!",
    "(1,2)+1",
  ],
)
def test_what_has_no_value_within_the_bounds_is_undefined(text):
  with pytest.raises(values.UndefinedError):
    values.evaluate(read(text), {}, values.Budget())


def test_a_power_too_large_is_not_worked_out():
  start = time.process_time()
  with pytest.raises(values.UndefinedError, match="too large"):
    values.evaluate(read("e^{" + "10^{999}" * 5 + "}"), {}, values.Budget())
  assert time.process_time() - start < 0.5


def test_a_budget_bounds_the_operations():
  node = read("1+1+1")
  assert values.evaluate(node, {}, values.Budget(4)) == 3
  with pytest.raises(values.UndefinedError, match="too many"):
    values.evaluate(node, {}, values.Budget(3))


@pytest.mark.parametrize(
  "value, decimal, digits, expected",
  [
    (Fraction(1, 3), "0.333333", 6, True),
    (Fraction(2, 3), "0.666667", 6, True),
    (Fraction(2, 3), "0.666666", 6, True),  # Cut off.
    (Fraction(2, 3), "0.666665", 6, False),
    (Fraction(1, 3), "0.333334", 6, False),  # Rounded up by more than half.
    (Fraction(-2, 3), "-0.666666", 6, True),
    (Fraction(-2, 3), "0.666667", 6, False),
    (Fraction(600, 7), "85.7143", 6, True),
    (Fraction(600, 7), "85.7142", 6, True),
    (Fraction(391), "390.9999999", 10, False),  # Not cut off: 391 has no further digits.
    (Fraction(391), "391.0000001", 10, False),
    (Fraction(0), "0.000001", 1, False),
    (Fraction(1, 10**30), "0", 1, False),
  ],
)
def test_rounding_to_significant_digits(value, decimal, digits, expected):
  assert values.rounds_to(value, Fraction(decimal), digits) == expected


@pytest.mark.parametrize(
  "fraction, digits, expected",
  [
    ("1/3", 6, True),
    ("-1/6", 6, True),
    ("7/3", 7, True),
    ("500000/3", 6, True),
    ("1/3000000", 6, True),
    ("5/37", 6, True),  # 0.135135
    ("5/37", 5, False),
    ("22/7", 7, False),
    ("22/7", 12, True),
    ("355/113", 50, False),
    ("1234567/10000000", 6, False),
    ("1/2", 6, True),
    ("0", 6, False),
    (f"1/{10**4000 + 3}", 50, False),
  ],
)
def test_digits_that_show_a_fractions_period_twice(fraction, digits, expected):
  assert values.shows_period(Fraction(fraction), digits) == expected


@given(st.fractions(min_value=-1000, max_value=1000).filter(bool), st.integers(6, 12))
def test_every_rounding_of_a_number_answers_it_and_the_next_does_not(value, digits):
  rounded = Fraction(f"{float(value):.{digits - 1}e}")
  unit = Fraction(10) ** (math.floor(math.log10(abs(rounded))) - digits + 1)
  assert values.rounds_to(value, rounded, digits) or abs(value) > 10**6
  assert not values.rounds_to(value, rounded + 2 * unit, digits)


# ---- Forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text, kinds",
  [
    ("391", set()),
    (r"\frac{3}{4}", set()),
    (r"2\sqrt{3}+\pi", set()),
    (r"\frac{1+\sqrt5}{2}", set()),
    ("x^2+2x+1", set()),
    (r"1.6\times 10^{-19}", set()),
    ("1+2", {"like terms"}),
    ("x+2x", {"like terms"}),
    (r"\sqrt2+3\sqrt2", {"like terms"}),
    (r"2\cdot 3", {"numbers to multiply"}),
    (r"1\cdot x", {"factor of one"}),
    ("2^3", {"number to a power"}),
    (r"\frac{2}{4}", {"reducible fraction"}),
    (r"\frac{2x}{4}", {"reducible fraction"}),
    (r"\frac{4+2\sqrt3}{2}", {"reducible fraction"}),
    (r"\frac{3}{1}", {"reducible fraction"}),
    (r"\frac{0.5}{2}", {"fraction of decimals"}),
    (r"1\frac{2}{4}", {"reducible fraction"}),
    (r"\sqrt{12}", {"reducible root"}),
    (r"\sqrt[4]{4}", {"reducible root"}),
    (r"\sqrt{x^2}", {"reducible root"}),
    (r"\frac{1}{\sqrt2}", {"constant in a denominator", "root in a denominator"}),
    (r"\sqrt2\sqrt3", {"roots to multiply"}),
    (r"\sqrt{1+\sqrt2}", {"nested root"}),
    (r"x\cdot x", {"powers to multiply"}),
    ("(x^2)^3", {"power of a product or a power"}),
    ("x^{-2}", {"negative exponent", "denominator", "degree of denominators"}),
    ("x^0", {"exponent of zero or one"}),
    (r"\frac{1}{x}", {"denominator", "degree of denominators"}),
    ("(x+1)(x+2)", {"product of sums"}),
    ("(x+1)^2", {"product of sums"}),
    ("2(2x+4)", {"product of sums", "common factor"}),
    ("x(x^2+x)", {"product of sums", "common factor"}),
    (r"\frac12(x+1)", set()),
    ("5-(x+1)", {"nested sum", "negated sum"}),
    (r"\sin x", {"function sin"}),
    (r"e^{i\pi}", {"exponent to evaluate"}),
    ("x+0", {"term of zero"}),
  ],
)
def test_work_left_by_kind(text, kinds):
  assert set(forms.work(read(text))) == kinds


def constants(chance, depth):
  """A random expression of numbers, pi, e, i and roots."""
  if depth == 0 or chance.random() < 0.25:
    return chance.choice(
      [
        integer(chance.randint(0, 9)),
        Node("constant", name=chance.choice(["pi", "e", "i"])),
        Node("root", (integer(chance.choice([2, 3, 5, 6])), integer(chance.choice([2, 3])))),
        Node("number", name="decimal", value=Fraction(chance.randint(1, 30), 10), digits=2),
      ]
    )
  kind = chance.choice("sum sum product product quotient quotient power negative root".split())
  arguments = {"sum": chance.choice([2, 3]), "product": chance.choice([2, 3]), "negative": 1, "root": 1}
  args = [constants(chance, depth - 1) for _ in range(arguments.get(kind, 2))]
  return Node(kind, (*args, integer(2)) if kind == "root" else tuple(args))


def is_literal(node):
  return all(part.kind in ("number", "negative", "quotient") for part in node.walk())


def test_no_expression_without_work_is_worth_a_plain_number():
  chance = random.Random(0)
  checked = 0
  for _ in range(4000):
    node = constants(chance, chance.choice([1, 2, 2, 3]))
    if is_literal(node) or forms.work(node):
      continue
    try:
      value = values.evaluate(node, {}, values.Budget())
    except values.UndefinedError:
      continue
    checked += 1
    for multiple in (value * n for n in range(1, 7)):
      assert abs(multiple - values.context().nint(multiple.real)) > 1e-20, shown(node)
  assert checked > 300


@pytest.mark.parametrize(
  "answer, gold, why",
  [
    ("x+y", "x", "symbols that the reference does not have"),
    (r"\sqrt2+\sqrt3+\sqrt5+\sqrt7", "5", "far longer than the reference"),
    ("40", r"2^3\cdot 5", "not a product of primes"),
    ("x^2-4", "(x-2)(x+2)", "product of sums missing"),
    ("(x-2)(x+2)", "x^2-4", "product of sums"),
    (r"\frac{2x}{x^2-1}", r"\frac{1}{x-1}+\frac{1}{x+1}", "denominator missing"),
    (r"1-\frac{6}{x}", r"\frac{x-6}{x}", "terms to combine or to divide"),
    (r"\frac{1}{2}\ln 9", r"\ln 3", "other arguments of a function"),
    (r"\sin 2x", r"2\sin x\cos x", "other arguments of a function"),
    ("1024", "2^{10}", ""),
    (r"\ln 4", r"2\ln 2", ""),
    (r"\frac{1}{x^2}", "x^{-2}", ""),
    (r"\sqrt{x}", "x^{1/2}", ""),
  ],
)
def test_why_an_answer_is_not_as_simple(answer, gold, why):
  assert forms.work_left(read(answer), read(gold), equal=lambda one, other: one == other) == why


# ---- Equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "gold, answer",
  [
    ("x+y", "y+x"),
    (r"\sin x+\ln y", r"\ln y+\sin x"),
    ("(x+1)^{10}", "(1+x)^{10}"),
    ("2x-y+1=0", "-2x+y-1=0"),
    ("y=2x+1", "2x+1=y"),
    ("y>2x", "2x<y"),
    ("(-2,2)", "-2<x<2"),
    (r"x\ne 2", r"(2,\infty)\cup(-\infty,2)"),
    (r"\mathbb{R}\setminus\{1,0\}", r"(-\infty,0)\cup(0,1)\cup(1,\infty)"),
    (r"\pm 2", "-2,2"),
    (r"x=\pm 2", "2,-2"),
    (r"\{1\pm\sqrt5,-2\}", r"-2,1-\sqrt5,1+\sqrt5"),
    ("(1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("(1,2)", "x=1,y=2"),
    ("5 \\text{ cm}", "5 centimeters"),
    ("60 mph", r"60\text{ miles per hour}"),
    (r"4\text{ m}^2", "4 square meters"),
    ("0.333333", r"\frac13"),
    (r"\frac13", "0.333333"),
    ("166.666667", r"\frac{500}{3}"),
    ("0.135135", r"\frac{5}{37}"),
    ("1.414214", r"\sqrt{2}"),
    (r"\frac{22}{7}", "3.142857"),
    ("even", "EVEN"),
    (r"\text{(A)}", "A"),
    (r"\frac34", r"{3 \over 4}"),
    ("391", r"\color{red}{391}"),
    ("391", r"\boldsymbol{391}"),
    (r"\{1,2\}", r"\lbrace 2,1\rbrace"),
    ("x<1 or x>2", "x<1, x>2"),
    ("x=1 or x=2", "x=1 and x=2"),
  ],
)
def test_equal_answers(gold, answer):
  assert equality.equal(gold, answer)
  assert equality.equal(gold, answer, any_form=True)


@pytest.mark.parametrize(
  "gold, answer",
  [
    ("x+y", "x-y"),
    ("x+y", "x+z"),
    ("y=2x+1", "x=2y+1"),
    ("y>2x", "y<2x"),
    ("y>2x", "y=2x"),
    ("2x-y+1=0", "2x-y=0"),
    ("(-2,2)", "-2<x\\le 2"),
    ("x>2", "y>2"),
    (r"\pm 2", "2"),
    ("(1,2)", "y=1,x=2"),
    ("(1,2)", "[1,2]"),
    (r"\{1,2\}", "(1,2)"),
    ("1,2", "1,1"),
    ("1,1", "1,2"),
    ("5 \\text{ cm}", "5 m"),
    ("5 \\text{ cm}", "5\\text{ cm}^2"),
    (r"\$5", "\N{EURO SIGN}5"),
    ("2^{2008}", "2^{2008}+1"),
    ("1.6e-19", "3.2e-19"),
    ("1.6e-19", "0"),
    ("0", "1e-300"),
    (r"\pi", r"\frac{355}{113}"),
    ("3.142857", r"\frac{22}{7}"),
    ("3.141593", r"\frac{355}{113}"),
    ("0.142857", r"\frac17"),
    ("0.123457", r"\frac{1234567}{10000000}"),
    ("AB", "ab"),
    ("391", "39 1"),
    ("391", r"39\;1"),
    ("x<1 or x>2", "x<1 and x>2"),
    ("x>1 and x<2", "x>1 or x<2"),
    ("north", "thorn"),
    ("5", "x"),
    (r"\infty", r"-\infty"),
    (r"\sqrt{x^2}", "x"),
    ("|x|", "x"),
  ],
)
def test_other_answers(gold, answer):
  assert not equality.equal(gold, answer)
  assert not equality.equal(gold, answer, any_form=True)


def test_an_answer_that_is_right_at_other_points_is_wrong():
  # The points follow from the texts, so that no polynomial vanishes at all of them.
  gold, wrong = "x", "x+(x-1)(x-2)(x-0.5)(x-1.25)(x+1)(x+2)(x-3)"
  assert not equality.equal(gold, wrong, any_form=True)
  points = [equality._Comparison(seed, True)._points(read("x"), read("x")) for seed in (b"a", b"a", b"b")]
  assert points[0] == points[1] != points[2]
  assert len({point["x"] for point in points[0]}) == equality._POINTS


def test_the_sign_of_a_symbol_is_told_whatever_the_texts_are():
  for n in range(2, 40):
    assert not equality.equal(f"{n}|x|", f"{n}x", any_form=True)
    assert not equality.equal(f"{n}x", rf"\sqrt{{{n * n}x^2}}", any_form=True)
    assert equality.equal(rf"{n}\ln x", rf"\ln x\cdot {n}")


def polynomial(coefficients):
  return "+".join(f"{c}x^{{{n}}}" if n > 1 else f"{c}x" if n else f"{c}" for n, c in enumerate(coefficients) if c)


@given(st.lists(st.integers(2, 9), min_size=2, max_size=6), st.randoms())
def test_terms_in_any_order_are_equal_and_another_coefficient_is_not(coefficients, chance):
  text = polynomial(coefficients)
  terms = text.split("+")
  chance.shuffle(terms)
  assert equality.equal(text, "+".join(terms))
  coefficients[chance.randrange(len(coefficients))] += 1
  assert not equality.equal(text, polynomial(coefficients), any_form=True)


@given(st.integers(-999, 999), st.integers(2, 99), st.integers(2, 9))
def test_fractions_have_to_be_in_lowest_terms(above, below, factor):
  fraction = Fraction(above, below)
  gold = f"\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}" if fraction.denominator > 1 else f"{fraction}"
  assert equality.equal(gold, str(fraction))
  raised = f"\\frac{{{factor * fraction.numerator}}}{{{factor * fraction.denominator}}}"
  assert not equality.equal(gold, raised)
  assert equality.equal(gold, raised, any_form=True)
