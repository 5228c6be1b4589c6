# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Multilinear maps that are differentiated by each other, in any order and mode.

JAX transposes a gather to a scatter-add, and a product of ragged groups once
but not twice. The maps here are the partial derivatives of one form,

    form(x_0, ..., x_n) = <maps[i](all but x_i), x_i>   for every i,

so each is a derivative of the others: however often they are differentiated,
forwards or backwards, nothing runs but one of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
  """A multilinear form, by its partial derivatives.

  Attributes:
    name: of the form, for jaxprs.
    maps: `maps[i](*arguments, *indices, dtype=)`: the derivative by argument i,
      of all the other arguments in order. It is linear in each of them, and has
      the shape of argument i and the dtype that it is told. The indices are
      integers, which have no derivative.
    is_looped: whether a batch is computed one by one.
  """

  name: str
  maps: tuple[Callable[..., jax.Array], ...]
  is_looped: bool = False

  def __repr__(self) -> str:
    return self.name


def derivative(
  form: Form,
  number: int,
  arguments: Sequence[jax.Array],
  indices: Sequence[jax.Array],
  dtypes: Sequence[Any],
) -> jax.Array:
  """`form.maps[number]`, with derivatives, batches and shards.

  Args:
    form: the form.
    number: which argument it is the derivative by.
    arguments: all the others, in order.
    indices: integers.
    dtypes: of all arguments of the form.

  Returns:
    Like argument `number` of the form, of its dtype.
  """
  params = dict(form=form, number=number, dtypes=tuple(dtypes), batches=())
  return _derivative.bind(*arguments, *indices, **params)


# One tuple for each `jax.vmap`, the outermost first: whether an operand has its
# axis. The axes lie in front, in this order.
_Batches = tuple[tuple[bool, ...], ...]


def _call(
  *operands: jax.Array,
  form: Form,
  number: int,
  dtypes: tuple[Any, ...],
  batches: _Batches,
) -> jax.Array:
  call = functools.partial(form.maps[number], dtype=dtypes[number])
  if form.is_looped:
    call = jax.custom_batching.sequential_vmap(call)
  for has_axis in reversed(batches):
    call = jax.vmap(call, [0 if has else None for has in has_axis])
  return call(*operands)


def _abstract_eval(*operands: Any, **params: Any) -> Any:
  # Not by `jax.eval_shape`, whose result lacks the mesh of a partly manual one.
  traced = jax.jit(functools.partial(_call, **params)).trace(*operands)
  (out,) = traced.jaxpr.out_avals
  return out


def _jvp(
  primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[jax.Array, Any]:
  parts = [
    _derivative.bind(*primals[:i], tangent, *primals[i + 1 :], **params)
    for i, tangent in enumerate(tangents[: len(params["dtypes"]) - 1])
    if type(tangent) is not ad.Zero
  ]
  out = _derivative.bind(*primals, **params)
  if not parts:
    # JAX asks for it where the indices come out of a custom derivative.
    return out, ad.Zero(jax.typeof(out).to_tangent_aval())
  return out, functools.reduce(ad.add_tangents, parts)


def _transpose(
  cotangent: Any,
  *operands: Any,
  number: int,
  batches: _Batches,
  **params: Any,
) -> list[Any]:
  result: list[Any] = [None] * len(operands)
  if type(cotangent) is ad.Zero:
    return result
  (place,) = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
  by = place + (place >= number)

  def exchange(values: Sequence[Any], value: Any) -> list[Any]:
    """What is at argument `number` comes in, what is at argument `by` goes."""
    values = [*values[:number], value, *values[number:]]
    return values[:by] + values[by + 1 :]

  gradient = _derivative.bind(
    *exchange(operands, cotangent),
    number=by,
    batches=tuple(tuple(exchange(has, True)) for has in batches),
    **params,
  )
  shared = tuple(i for i, has in enumerate(batches) if not has[place])
  result[place] = jnp.sum(gradient, axis=shared) if shared else gradient
  return result


def _batch(
  operands: Sequence[Any],
  dims: Sequence[int | None],
  *,
  batches: _Batches,
  **params: Any,
) -> tuple[jax.Array, int]:
  operands = [
    x if d is None else jnp.moveaxis(x, d, 0)
    for x, d in zip(operands, dims, strict=True)
  ]
  has_axis = tuple(d is not None for d in dims)
  return _derivative.bind(*operands, batches=(has_axis, *batches), **params), 0


_derivative = core.Primitive("jaxroute_multilinear")
_derivative.def_impl(_call)
_derivative.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[_derivative] = _jvp
ad.primitive_transposes[_derivative] = _transpose
batching.primitive_batchers[_derivative] = _batch
mlir.register_lowering(
  _derivative, mlir.lower_fun(_call, multiple_results=False)
)
