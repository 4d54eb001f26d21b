-- submit: put a new request into the queue. Its body was set before, in the same pipeline.
--   KEYS     request:<id>, queue, deadlines, counters
--   ARGV[2]  request id        [3] front end        [4] nonce of this submit: a retried call is recognised by it
--   ARGV[5]  queue limit, -1 for none      [6] ms until it expires      [7] ms that its record is kept after its end
--   ARGV[8]  input tokens      [9] KV tokens to reserve on decode       [10] model
--   returns  {"QUEUED", epoch} | {"DUPLICATE", state} | {"FULL", depth}

local id, timeout, retain = ARGV[2], tonumber(ARGV[6]), tonumber(ARGV[7])
local seen = redis.call('HMGET', KEYS[1], 'state', 'nonce', 'epoch')
if seen[1] then
  if seen[2] == ARGV[4] then return {'QUEUED', tonumber(seen[3])} end
  return {'DUPLICATE', seen[1]}
end
local limit, depth = tonumber(ARGV[5]), redis.call('XLEN', KEYS[2])
if limit >= 0 and depth >= limit then
  count('rejected')
  return {'FULL', depth}
end
local now = now_ms()
local entry = enqueue(id, 1, ARGV[8], ARGV[10])
redis.call('HSET', KEYS[1], 'state', 'queued', 'epoch', 1, 'attempts', 0, 'frontend', ARGV[3], 'nonce', ARGV[4],
           'model', ARGV[10], 'input_tokens', ARGV[8], 'kv_tokens', ARGV[9], 'created_ms', now,
           'deadline_ms', now + timeout, 'queue_entry', entry)
redis.call('PEXPIRE', KEYS[1], timeout + retain)
redis.call('ZADD', KEYS[3], now + timeout, id)
count('submitted')
return {'QUEUED', 1}
