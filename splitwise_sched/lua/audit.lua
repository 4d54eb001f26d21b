-- audit: compare what is reserved on one decode instance with the requests that it holds, and put it right.
--   KEYS     decode-load, counters
--   ARGV[2]  a number that says which instance: any      [3] requests at most: one that holds more is left alone
--   returns  {} | {instance, tokens, requests: reserved for nobody; inbox entries of nobody}
-- Scripts keep both equal. A record that somebody deleted, or a script that met an error half way, does not.

local num = redis.call('ZCARD', KEYS[1])
if num == 0 then return {} end
local rank, limit = tonumber(ARGV[2]) % num, tonumber(ARGV[3])
local me = redis.call('ZRANGE', KEYS[1], rank, rank)[1]
local lease = redis.call('HMGET', P .. 'instance:' .. me, 'capacity_tokens', 'reserved_tokens', 'reserved_requests')
local entries = redis.call('XRANGE', P .. 'inbox:' .. me, '-', '+', 'COUNT', limit + 1)
if number(lease[1]) <= 0 or #entries > limit then return {} end
local tokens, requests, num_stale = 0, 0, 0
for _, entry in ipairs(entries) do
  local id, epoch
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'id' then id = entry[2][i + 1] end
    if entry[2][i] == 'epoch' then epoch = entry[2][i + 1] end
  end
  local r = id and load_some(id, {'state', 'epoch', 'decode', 'inbox_entry', 'prefill', 'kv_reserved'})
  if r and r.epoch == epoch and r.inbox_entry == entry[1] and is_with(me, r) then
    tokens, requests = tokens + number(r.kv_reserved), requests + 1
  else
    redis.call('XDEL', P .. 'inbox:' .. me, entry[1])
    if id and epoch then drop_from(me, id, epoch, 'its record is gone') end
    num_stale = num_stale + 1
  end
end
local too_many, too_many_requests = number(lease[2]) - tokens, number(lease[3]) - requests
if too_many == 0 and too_many_requests == 0 and num_stale == 0 then return {} end
set_reserved(me, tokens, requests)
set_load(me, tokens, number(lease[1]))
count('reservations_repaired')
return {me, too_many, too_many_requests, num_stale}
