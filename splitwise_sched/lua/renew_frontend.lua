-- renew_frontend: a front end takes or renews its lease, and drops what it has read of its stream.
--   KEYS     frontend:<id>, out:<id>, frontends
--   ARGV[2]  front end      [3] lease ms      [4] it has read its stream up to this entry
--   ARGV[5]  a field that is no request id: it only makes the stream exist
--   returns  1 | 0: there was no stream, or it is an older state of it, so what was in it is lost; it is there now

local me, lease = ARGV[2], tonumber(ARGV[3])
redis.call('SET', KEYS[1], 'alive', 'PX', lease)
redis.call('ZADD', KEYS[3], now_ms() + lease, me)
local function is_before(id, other)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  local other_ms, other_seq = string.match(other, '^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms < other_ms or ms == other_ms and tonumber(seq) < tonumber(other_seq)
end

if redis.call('PEXPIRE', KEYS[2], lease) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' and is_before(info[i + 1], ARGV[4]) then return 0 end
  end
  redis.call('XTRIM', KEYS[2], 'MINID', '~', ARGV[4])
  return 1
end
redis.call('XADD', KEYS[2], '*', ARGV[5], me)
redis.call('PEXPIRE', KEYS[2], lease)
return 0
