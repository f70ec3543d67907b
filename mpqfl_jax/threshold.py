"""Threshold CKKS: nobody holds the key, all clients open a sum together.

Each client adds its own secret to the public key of the one before it: one step
a client, one after another. What is encrypted under the last public key opens
only with a share from each (n of n; Asharov et al. 2012, by OpenFHE):

    group = generate(parameters(clients=3), [7, 8, 9])
    messages = [encrypt(group, u, w) for u, w in updates]
    total = add(group, messages)
    shares = {c: share(group, c, total) for c in group.members}
    open_shares(group, total, shares, count=3).mean

A client that is not there when its turn comes is passed over. One that has
added its secret and then leaves takes the key with it: nothing is lost but the
time, and the others generate another.

A message is framed and checked as in `he`, which catches what is damaged,
truncated or of another key. OpenFHE's own reader is no trust boundary: whoever
forges what lies inside can end the process that reads it.

Before it sends a share, a client drowns it in noise of standard deviation 2^20
per coefficient, OpenFHE's fixed choice. It is some 2^12 times the noise of a
fresh ciphertext, and what limits the accuracy of the sum.
"""

from collections.abc import Collection, Mapping, Sequence
import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax import ckks, errors, he

MODULUS_BITS = 60  # one prime, the largest there is
SHARE_NOISE_STDDEV = 2.0**20  # OpenFHE, NoiseFlooding::MP_SD


def parameters(
  clients: int, bound: float = 4.0, degree: int = 4096
) -> ckks.Parameters:
  """Parameters of 128-bit security for keys of so many clients.

  Args:
    clients: the most that a key may have.
    bound: largest magnitude of an entry of an update.
    degree: of the polynomials, a power of two.

  Raises:
    UserError: not a degree with which 60 bits are secure, or more clients than
      leave room above the noise of their shares.
  """
  if clients < 2 or not bound > 0 or not math.isfinite(bound):
    raise errors.UserError(
      f"a threshold key for {clients} clients with entries up to {bound}."
      " Expected at least two clients and a bound above 0."
    )
  if he.MAX_MODULUS_BITS.get(degree, 0) < MODULUS_BITS:
    known = [n for n, b in he.MAX_MODULUS_BITS.items() if b >= MODULUS_BITS]
    raise errors.UserError(
      f"degree={degree} has no 128 bits of security at a modulus of"
      f" {MODULUS_BITS} bits. Expected one of {', '.join(map(str, known))}."
    )
  # Half of the modulus is for the sign, and a factor of two stays free.
  scale_bits = MODULUS_BITS - 2 - math.ceil(math.log2(clients))
  made = ckks.Parameters(
    he.Modulus(degree, MODULUS_BITS, 0), scale_bits, float(bound), clients
  )
  precision = math.log2(bound / noise_stddev(made, clients))
  if precision < ckks.MIN_PRECISION_BITS:
    raise errors.UserError(
      f"a modulus of {MODULUS_BITS} bits is too small for {clients} shares: the"
      f" sum would stand {precision:.0f} bits above their noise, which needs"
      f" {ckks.MIN_PRECISION_BITS}. Expected fewer clients or a smaller degree."
    )
  return made


def noise_stddev(params: ckks.Parameters, clients: int) -> float:
  """Standard deviation of an entry of a sum's noise, in updates.

  Each share moves every coefficient by its own noise; decoding sums `degree`
  coefficients and takes the real part, half of the variance, to which OpenFHE
  adds as much again (against Li and Micciancio 2021). The noise of the
  ciphertexts themselves is small beside it.
  """
  coefficient = SHARE_NOISE_STDDEV * math.sqrt(clients)
  slot = coefficient * math.sqrt(params.modulus.degree)
  return params.bound * slot / 2**params.scale_bits


class Group(NamedTuple):
  """Clients with a joint key.

  Attributes:
    parameters: of the scheme.
    members: the clients whose secrets are in the key, in the order of steps.
    fingerprint: 8 bytes that tell keys apart.
    public_bytes: length of a public key on the wire.
    context: OpenFHE's.
    public: the joint key.
    secrets: client -> its own secret, which it never sends.
  """

  parameters: ckks.Parameters
  members: tuple[int, ...]
  fingerprint: bytes
  public_bytes: int
  context: Any
  public: Any
  secrets: dict[int, Any]

  @property
  def wire_bytes(self) -> int:
    """Sent for the joint key: each to the next, and the last to all."""
    return (3 * len(self.members) - 1) * self.public_bytes


def library() -> Any:
  """OpenFHE.

  Raises:
    UserError: it is not installed, or not for this Python.
  """
  try:
    import openfhe
  except ImportError as e:
    raise errors.UserError(
      f"threshold encryption needs OpenFHE, which does not load ({e})."
      " Expected: pip install 'mpqfl_jax[threshold]' on a system and a Python"
      " that it has a wheel for, or a build of it."
    ) from e
  return openfhe


def generate(
  params: ckks.Parameters,
  clients: Sequence[int],
  absent: Collection[int] = (),
) -> Group:
  """Makes a joint key, one client after another.

  Args:
    params: from `parameters`.
    clients: ids, in the order of steps.
    absent: those who do not answer when it is their turn; they are passed over.

  Raises:
    UserError: OpenFHE is not installed, fewer than two clients are there, or
      more than the parameters allow for.
  """
  members = tuple(c for c in clients if c not in absent)
  if not 2 <= len(members) <= params.clients:
    raise errors.UserError(
      f"{len(members)} clients are there to make a joint key. Expected 2 to"
      f" {params.clients}."
    )
  lib = library()
  settings = lib.CCParamsCKKSRNS()
  settings.SetMultiplicativeDepth(0)
  settings.SetFirstModSize(params.modulus.bits)
  settings.SetScalingModSize(params.scale_bits)
  settings.SetScalingTechnique(lib.ScalingTechnique.FIXEDMANUAL)
  settings.SetKeySwitchTechnique(lib.KeySwitchTechnique.BV)
  settings.SetSecurityLevel(lib.SecurityLevel.HEStd_128_classic)
  settings.SetRingDim(params.modulus.degree)
  context = lib.GenCryptoContext(settings)
  features = lib.PKESchemeFeature
  for feature in (
    features.PKE,
    features.KEYSWITCH,
    features.LEVELEDSHE,
    features.MULTIPARTY,
  ):
    context.Enable(feature)
  pair = context.KeyGen()
  secrets = {members[0]: pair.secretKey}
  for client in members[1:]:
    pair = context.MultipartyKeyGen(pair.publicKey)
    secrets[client] = pair.secretKey
  serialized = lib.Serialize(pair.publicKey, lib.BINARY)
  return Group(
    params,
    members,
    hashlib.sha256(serialized).digest()[:8],
    len(serialized),
    context,
    pair.publicKey,
    secrets,
  )


def encrypt(group: Group, update: np.ndarray, weight: float) -> bytes:
  """Encrypts a client's weighted update under the joint key.

  Args:
    group: whose members open it together.
    update: [values], finite, no entry beyond the parameters' bound.
    weight: in (0, 1]; in units that all clients agree on.

  Raises:
    UserError: an entry beyond the bound, or a weight out of its range.
  """
  lib, context = library(), group.context
  chunks = []
  whole = group.parameters.plaintext(update, weight, None)
  for numbers in he.cut(group.parameters, whole):
    plain = context.MakeCKKSPackedPlaintext(numbers.tolist())
    ciphertext = context.Encrypt(group.public, plain)
    chunks.append(lib.Serialize(ciphertext, lib.BINARY))
  return he.frame(group.fingerprint, len(update), 1, chunks)


def add(group: Group, messages: Sequence[bytes]) -> bytes:
  """Adds clients' messages without opening them; see `he.add`.

  Raises:
    CiphertextError: a message is damaged, of another key or of another length,
      or there are more clients than the key has.
  """
  if not messages:
    raise he.CiphertextError("no message to add")
  num_values, count, total = 0, 0, []
  for i, message in enumerate(messages):
    length, clients, ciphertexts = _read(group, message)
    if i == 0:
      num_values, total = length, ciphertexts
    elif length != num_values:
      raise he.CiphertextError(f"sum of {num_values} values and {length}")
    else:
      total = [
        group.context.EvalAdd(a, b)
        for a, b in zip(total, ciphertexts, strict=True)
      ]
    count += clients
  if count > len(group.members):
    raise he.CiphertextError(
      f"sum of {count} clients, the key has {len(group.members)}"
    )
  return _write(group, num_values, count, total)


def share(group: Group, client: int, message: bytes) -> bytes:
  """One client's part in opening a sum.

  Args:
    group: with the joint key.
    client: one of its members; the first one's share is of another form.
    message: from `add`.

  Raises:
    CiphertextError: the message is damaged or of another key.
  """
  num_values, count, ciphertexts = _read(group, message)
  context, secret = group.context, group.secrets[client]
  lead = client == group.members[0]
  part = (
    context.MultipartyDecryptLead if lead else context.MultipartyDecryptMain
  )
  return _write(group, num_values, count, part(ciphertexts, secret))


def open_shares(
  group: Group, message: bytes, shares: Mapping[int, bytes], count: int
) -> he.Sum:
  """Opens a sum with the shares of all members.

  Args:
    group: with the joint key.
    message: the sum.
    shares: client -> from `share`.
    count: how many clients the sum should have.

  Raises:
    CiphertextError: a share is missing or damaged, or the sum is not of
      `count` clients.
  """
  missing = [c for c in group.members if c not in shares]
  if missing:
    raise he.CiphertextError(
      f"no share from client {', '.join(map(str, missing))}: the sum opens with"
      f" all {len(group.members)} or not at all"
    )
  num_values = _read(group, message)[0]
  parts = []
  for client in group.members:
    length, _, part = _read(group, shares[client])
    if length != num_values:
      raise he.CiphertextError(f"share of {length} values, sum of {num_values}")
    parts.append(part)
  values = []
  for chunk in zip(*parts, strict=True):
    try:
      plain = group.context.MultipartyDecryptFusion(list(chunk))
    except RuntimeError as e:
      raise he.CiphertextError(f"the shares do not fit together: {e}") from e
    values.append(np.asarray(plain.GetRealPackedValue()))
  slots = group.parameters.slots
  whole = np.concatenate([np.resize(v, slots) for v in values])
  whole = whole[: group.parameters.slots_for(num_values)]
  return group.parameters.open(whole, num_values, count)


def _write(
  group: Group, num_values: int, count: int, ciphertexts: Sequence[Any]
) -> bytes:
  lib = library()
  chunks = [lib.Serialize(c, lib.BINARY) for c in ciphertexts]
  return he.frame(group.fingerprint, num_values, count, chunks)


def _read(group: Group, message: bytes) -> tuple[int, int, list]:
  lib = library()
  num_values, count, chunks = he.unframe(
    group.parameters, group.fingerprint, message
  )
  ciphertexts = []
  for chunk in chunks:
    try:
      ciphertext = lib.DeserializeCiphertextString(chunk, lib.BINARY)
    except RuntimeError as e:
      raise he.CiphertextError(f"not a ciphertext: {e}") from e
    ciphertexts.append(ciphertext)
  return num_values, count, ciphertexts
