-- reap: take back what an instance without a lease held, a bounded number of requests a call.
--   KEYS     instance:<id>, queue, inbox:<id>, control:<id>, instances, decode-load, counters
--   ARGV[2]  instance id      [3] requests at most      [4] "leave": it says so itself, and gives its lease up
--   returns  {requests taken back, 1 when nothing of it is left | 0}

local me, limit = ARGV[2], tonumber(ARGV[3])
if ARGV[4] == 'leave' then redis.call('UNLINK', KEYS[1]) end
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, 0} end
redis.call('ZREM', KEYS[6], me)
local why = 'instance ' .. me .. (ARGV[4] == 'leave' and ' stopped' or ' lost its lease')

local function of(entry)
  local named = {}
  for i = 1, #entry, 2 do named[entry[i]] = entry[i + 1] end
  return named.id, named.epoch
end

local taken, looked = 0, 0

-- claims of a queue that were not handed over to decode
local function take_claims(queue)
  local pending = redis.pcall('XPENDING', P .. queue, 'prefill', '-', '+', limit, me)
  if pending.err then return end
  for _, p in ipairs(pending) do
    looked = looked + 1
    local entry = redis.call('XRANGE', P .. queue, p[1], p[1])[1]
    local id, epoch
    if entry then id, epoch = of(entry[2]) end
    local r = id and load(id)
    remove_entry({queue = queue, queue_entry = p[1]})
    if r and r.epoch == epoch and r.queue_entry == p[1] and r.queue == queue then
      taken = taken + 1
      if r.state == 'queued' then
        forget_preference(id, r)
        enqueue(id, raise_epoch(id), r)
      elseif r.state == 'prefill' then
        lose(id, r, me, why)
      end
    end
  end
end

take_claims('queue')
take_claims('preferred:' .. me)
for _, e in ipairs(redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', limit)) do
  looked = looked + 1
  local id, epoch = of(e[2])
  local r = id and load(id)
  if r and r.epoch == epoch and r.decode == me and (r.state == 'prefill' or r.state == 'decode') then
    taken = taken + 1
    lose(id, r, me, why)
  end
  redis.call('XDEL', KEYS[3], e[1])
end
local spilled = spill_all(me, limit)
if looked + spilled > 0 then return {taken + spilled, 0} end
redis.pcall('XGROUP', 'DELCONSUMER', KEYS[2], 'prefill', me)
redis.call('SREM', KEYS[5], me)
redis.call('UNLINK', KEYS[3], KEYS[4], P .. 'preferred:' .. me)
count('instances_reaped')
return {taken, 1}
