-- Take, renew or give up a thread's run lease.
-- KEYS: shard
-- ARGV: thread, generation, 'acquire' | 'renew' | 'release', token, length in microseconds
-- Returns 1: it is, or was, the caller's; 0: another run holds it; -1: nobody holds it.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local field = 'f:' .. ARGV[1]
local known = redis.call('HMGET', KEYS[1], 'g', field)
if known[1] ~= ARGV[2] then
  return redis.error_reply('TIEREDGENERATION the generation here is ' .. (known[1] or 'unknown'))
end
local holder = holder_of(known[2], now)
if holder and holder ~= ARGV[4] then return 0 end
if ARGV[3] == 'release' then
  if known[2] then redis.call('HDEL', KEYS[1], field) end
  return holder and 1 or -1
end
if ARGV[3] == 'renew' and not holder then return -1 end
redis.call('HSET', KEYS[1], field, ARGV[4] .. ' ' .. string.format('%.0f', now + tonumber(ARGV[5])))
return 1
