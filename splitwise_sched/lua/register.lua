-- register: an instance announces itself and takes its lease.
--   KEYS     instance:<id>, instances, decode-load, queue, control:<id>
--   ARGV[2]  instance id      [3] lease ms      [4] role
--   ARGV[5]  n: the first n of the following fields must be equal on all live instances of the topic
--   ARGV[6...] fields and values of the record
--   returns  {"OK"}, also when it has its lease already | {"INCOMPATIBLE", other instance, field, its value}

local me, n = ARGV[2], tonumber(ARGV[5])
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- The reply to an earlier call was lost on its way. What was reserved here since then stays.
  redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]))
  return {'OK'}
end
if redis.call('SISMEMBER', KEYS[2], me) == 1 then
  return redis.error_reply('FENCED the lease of ' .. me .. ' has lapsed, and what it held was not yet taken back')
end
for _, other in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  if other ~= me then
    for i = 6, 6 + 2 * n - 1, 2 do
      local theirs = redis.call('HGET', P .. 'instance:' .. other, ARGV[i])
      if theirs and theirs ~= ARGV[i + 1] then return {'INCOMPATIBLE', other, ARGV[i], theirs} end
    end
  end
end
for _, queue in ipairs({KEYS[4], P .. 'preferred:' .. me}) do
  local made = redis.pcall('XGROUP', 'CREATE', queue, 'prefill', '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
end
redis.call('HSET', KEYS[1], 'role', ARGV[4], 'reserved_tokens', 0, 'reserved_requests', 0, 'started_ms', now_ms(),
           'seen_ms', now_ms(), unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]))
redis.call('SADD', KEYS[2], me)
redis.call('XADD', KEYS[5], '*', 'hello', me)
if ARGV[4] ~= 'prefill' then redis.call('ZADD', KEYS[3], 0, me) end
return {'OK'}
