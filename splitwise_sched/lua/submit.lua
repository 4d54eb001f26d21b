-- submit: put a new request into the queue. Its body came before, in the same pipeline, and never passes through here.
--   KEYS     request:<id>, queue, deadlines, counters, incoming:<nonce>, body:<id>
--   ARGV[2]  request id        [3] front end        [4] nonce of this submit: a retried call is recognised by it
--   ARGV[5]  queue limit, -1 for none      [6] ms until it expires      [7] ms that its record is kept after its end
--   ARGV[8]  input tokens      [9] KV tokens to reserve on decode       [10] model
--   ARGV[11] class             [12] its weight            [13] tenant
--   ARGV[14] ids of instances that it prefers, apart by spaces; "" for none   [15] ms that it waits for one of them
--   returns  {"QUEUED", epoch} | {"DUPLICATE", state} | {"FULL", depth}
--            | {"LATE", depth, ms until it would have ended, at the rate of late}

local id, timeout, retain = ARGV[2], tonumber(ARGV[6]), tonumber(ARGV[7])
local seen = redis.call('HMGET', KEYS[1], 'state', 'nonce', 'epoch')
if seen[1] then
  redis.call('UNLINK', KEYS[5])
  if seen[2] == ARGV[4] then return {'QUEUED', tonumber(seen[3])} end
  return {'DUPLICATE', seen[1]}
end
local waiting = tonumber(redis.call('HGET', KEYS[4], 'waiting')) or 0
local limit = tonumber(ARGV[5])
local length = redis.call('XLEN', KEYS[2])
local depth = length + waiting + redis.call('ZCARD', P .. 'preferred')
if limit >= 0 and depth >= limit then
  redis.call('UNLINK', KEYS[5])
  count('rejected')
  return {'FULL', depth}
end
local ends_ms = ends_in_ms(ARGV[11], tonumber(ARGV[12]), timeout)
if ends_ms and ends_ms > timeout then
  redis.call('UNLINK', KEYS[5])
  count('rejected')
  return {'LATE', depth, ends_ms}
end
redis.call('RENAME', KEYS[5], KEYS[6])
local now = now_ms()
local deadline = now + timeout
local record = {'state', 'queued', 'epoch', 1, 'attempts', 0, 'frontend', ARGV[3], 'nonce', ARGV[4], 'model', ARGV[10],
                'input_tokens', ARGV[8], 'kv_tokens', ARGV[9], 'class', ARGV[11], 'weight', ARGV[12],
                'tenant', ARGV[13], 'created_ms', now, 'deadline_ms', deadline}
local prefer = ARGV[14] ~= '' and ARGV[14] or nil
if prefer then redis.call('HSET', KEYS[1], 'prefer', prefer, 'prefer_ms', ARGV[15]) end
admit(id, {epoch = 1, input_tokens = ARGV[8], model = ARGV[10], class = ARGV[11], tenant = ARGV[13],
           deadline_ms = deadline, prefer = prefer}, length, record)
redis.call('PEXPIRE', KEYS[1], timeout + retain)
redis.call('ZADD', KEYS[3], deadline, id)
owe(ARGV[11], ARGV[12], tonumber(ARGV[8]))
count('submitted')
return {'QUEUED', 1}
